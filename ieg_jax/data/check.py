"""Checks the keys of a configuration that say what the data are; nothing is read."""

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, number, one_of
from ieg_jax.data import augment, backbone, transfer
from ieg_jax.data import trusted as trusted_set
from ieg_jax.data.noise import kinds
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError

CHECKS = {
    "name": one_of(*sources.REGISTRY),
    "unreadable": one_of("refuse", "skip"),
    "image_size": at_least(0, "0 or a number of pixels"),
    "num_classes": number(lambda v: v == 0 or v >= 2, "0 (from the data) or at least 2"),
    "validation_size": at_least(0, "0 or a number of examples"),
    "train_size": at_least(0, "0 (all) or a number of examples"),
    "folds": number(lambda v: v == 0 or v >= 2, "0 or at least 2"),
    "fold": at_least(0, "0 to data.folds - 1"),
    "transfer": one_of(*transfer.TYPES),
}


def validate(config: ConfigDict) -> None:
    """Checks the groups `data`, `noise`, `trusted`, `augment` and `backbone`.

    Args:
      config: the whole configuration.

    Raises:
      UserError: naming the key, the value and what is allowed.
    """
    config_lib.check_values(config.data, CHECKS, "data.")
    if config.data.fold >= max(1, config.data.folds):
        raise UserError(f"data.fold: got {config.data.fold}, expected 0 to data.folds - 1 = {config.data.folds - 1}")
    sources.check_reads(config.data)
    kinds.validate(config.noise)
    trusted_set.validate(config.trusted)
    augment.validate(config.augment)
    backbone.validate(config)
