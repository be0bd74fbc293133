"""Fine-tuning: how fast each layer of a network learns that starts from weights of elsewhere.

The learning rate of the schedule is that of the layer `head`. All others, the body, have `finetune.body_rate` of it,
and less the nearer they are to the images: each layer below takes `finetune.layer_decay` of the rate of the one above
(Clark et al. 2020; Bao et al. 2022). Until `finetune.probe_epochs` are over the body stays as it is, a linear probe, so
that gradients of a head that knows nothing yet do not spoil it (Kumar et al. 2022); only its moving averages of batch
norm go on.

The order of the layers follows from the numbers in their names: stage1_block0 is below stage1_block1, this below
stage2_block0. What has no number lies below these, or, where its name begins with one of TOP, above. Of networks whose
names do not say it (UNORDERED) all layers of the body have one rate.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, number, within
from ieg_jax.errors import UserError

UNORDERED = ("densenet100", "inception_resnet_v2", "resnet29_v2", "resnet50_v2")
HEAD, TOP = "head", ("head", "norm", "final", "pool", "attention_pool", "attn_pool", "fc_norm")
CHECKS = {
    "body_rate": within(0, 1),
    "layer_decay": number(lambda value: 0 < value <= 1, "in (0, 1]"),
    "probe_epochs": at_least(0),
}


def validate(config: ConfigDict) -> None:
    """Checks the group `finetune`.

    Args:
      config: the whole configuration.

    Raises:
      UserError: for a value that is not allowed, and for rates by layer of a network whose order is not known.
    """
    config_lib.check_values(config.finetune, CHECKS, "finetune.")
    if config.finetune.layer_decay != 1 and config.model.name in UNORDERED:
        raise UserError(
            f"finetune.layer_decay={config.finetune.layer_decay}: the names of the layers of {config.model.name} do "
            f"not tell their order; set it to 1.0"
        )


def depths(names: Iterable[str]) -> dict[str, int]:
    """Name of a layer -> its place, 0 at the images; blocks of one number share a place.

    Args:
      names: of the modules that a network consists of, the first part of the paths of its parameters.
    """
    names = set(names)
    numbers = {name: tuple(map(int, re.findall(r"\d+", name))) for name in names}
    ranks = {key: rank for rank, key in enumerate(sorted({key for key in numbers.values() if key}), start=1)}
    top = len(ranks) + 1
    return {name: ranks[numbers[name]] if numbers[name] else top if name.startswith(TOP) else 0 for name in names}


def rates(params: Any, finetune: ConfigDict, probe_steps: int, step: jax.Array) -> Any:
    """What the learning rate of each parameter is multiplied by.

    Args:
      params: the tree of parameters.
      finetune: the group of the configuration.
      probe_steps: steps of the linear probe.
      step: updates made so far.

    Returns:
      A tree like `params`, of scalars; 1.0 where nothing is set.

    Raises:
      UserError: for a network without a layer `head`.
    """
    if (finetune.body_rate, finetune.layer_decay, probe_steps) == (1.0, 1.0, 0):
        return 1.0
    if HEAD not in params:
        raise UserError(
            f"finetune: the network has the layers {', '.join(sorted(params)[:5])}, …, and none named {HEAD}, which "
            f"would learn at the full rate; name its last layer so, or leave finetune as it is"
        )
    place = depths(params)
    top = max(place.values())
    begun = jnp.where(step < probe_steps, 0.0, 1.0)

    def rate(path, _):
        name = path[0].key
        if name == HEAD:
            return jnp.ones(())
        return begun * finetune.body_rate * finetune.layer_decay ** (top - place[name])

    return jax.tree_util.tree_map_with_path(rate, params)
