"""Networks: one file for each family, and one line in the registry. `layers.Network` says what a network is.

`own` makes a network of any other Flax module. `pretrained` reads the weights that a run starts from.
"""

import jax
from ml_collections import ConfigDict

from ieg_jax.config import above, at_least, boolean, check_unread, check_values, one_of
from ieg_jax.errors import UserError, check_choice
from ieg_jax.models import convolution, onednn, pretrained
from ieg_jax.models.registry import REGISTRY, create

__all__ = ["REGISTRY", "UNSET", "create", "forget_unread", "validate"]

CONVENTIONS = {name: family.CONVENTIONS for name, family in REGISTRY.items() if "conventions" in family.READS}

CHECKS = {
    "name": one_of(*REGISTRY),
    "depth": at_least(1),
    "width": above(0),
    "variant": one_of("authors", "standard"),
    "dtype": one_of("float32", "bfloat16", "float64"),
    "remat": boolean,
    "convolutions": one_of(*convolution.FORMS),
    "conventions": one_of(*dict.fromkeys(value for values in CONVENTIONS.values() for value in values)),
}

# The values in configs/default.py of the keys that only some networks read.
UNSET = {"depth": 10, "width": 1.0, "variant": "authors", "conventions": "own"}


def validate(model: ConfigDict) -> None:
    """Checks the group `model` of the configuration, as far as it can be judged without building the network.

    Raises:
      UserError: for a network that does not exist, for a value that is not allowed, for a key that is set and that the
        network does not read, for float64 where jax has none, for oneDNN's convolutions where they cannot be had, and
        for a file of weights that is not read.
    """
    check_values(model, CHECKS, "model.")
    reads = {name: family.READS for name, family in REGISTRY.items()}
    check_unread(model, UNSET, reads, "name", "model.")
    if model.name in CONVENTIONS:
        check_choice(f"model.conventions of {model.name}", model.conventions, CONVENTIONS[model.name])
    if model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("model.dtype=float64: set the environment variable JAX_ENABLE_X64=1, without it jax has none")
    if model.convolutions == "onednn" and (reason := onednn.missing()):
        raise UserError(f"model.convolutions=onednn: {reason}; or set auto, which does without it")
    if model.convolutions == "onednn" and model.dtype != "float32":
        raise UserError(f"model.convolutions=onednn is for model.dtype=float32, got {model.dtype}; set auto")
    pretrained.validate(model)


def forget_unread(model: ConfigDict) -> None:
    """Gives the keys that the network does not read their defaults: `config.resolve` puts numbers into all of them."""
    reads = REGISTRY[model.name].READS
    model.update({key: value for key, value in UNSET.items() if key not in reads})
