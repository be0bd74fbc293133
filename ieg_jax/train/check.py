"""Checks a configuration before anything long starts: each part of the package checks the keys that it reads."""

from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods, models
from ieg_jax.config import at_least, one_of, within
from ieg_jax.data import check as data_check
from ieg_jax.errors import UserError
from ieg_jax.methods.base import ALL_VIEWS, USUAL_VIEWS
from ieg_jax.methods.parts import optimizers
from ieg_jax.runtime import checkpoints, mesh, watch
from ieg_jax.train import durations, finetune, schedules, tracking

CHECKS = {
    "seed": at_least(0),
    "batch_size": at_least(1),
    "batch_groups": at_least(1),
    "microbatches": at_least(1),
    "class_weight": one_of("none", "balanced"),
    "budget": one_of("steps", "forward_passes"),
    "eval_batch_size": at_least(1),
    "ema.decay": within(0, 1, open_end=True),
    "audit.epochs": at_least(0),
    "audit.suspects": at_least(0, "0 (none) or a number of examples"),
}


def validate(config: ConfigDict) -> None:
    """Checks every value that can be judged without the data.

    Raises:
      UserError: naming the key, the value and what is allowed.
    """
    config_lib.check_values(config, CHECKS)
    data_check.validate(config)
    models.validate(config.model)
    methods.validate(config)
    optimizers.validate(config.optimizer)
    schedules.validate(config.schedule)
    finetune.validate(config)
    durations.validate(config)
    checkpoints.validate(config.checkpoint)
    mesh.validate(config.mesh)
    watch.validate(config)
    tracking.validate(config)
    _check_groups(config)
    _check_streams(config)


def _check_groups(config: ConfigDict) -> None:
    """What mixes examples does so inside groups, so that groups and parts of a batch must fit together."""
    for key in ("batch_size", "trusted.batch_size"):
        value = config_lib.get(config, key)
        if value % config.batch_groups:
            raise UserError(
                f"{key}={value} is not a multiple of batch_groups={config.batch_groups}; change one of them"
            )
    if config.batch_groups % config.microbatches:
        raise UserError(
            f"microbatches={config.microbatches} does not divide batch_groups={config.batch_groups}: batch norm and "
            f"mixup work inside a group, so a part of the batch must be a whole number of groups; change one of them"
        )


def _check_streams(config: ConfigDict) -> None:
    """A method that compares views needs strong ones; what is said of views and trusted batches must have a reader."""
    name = config.method.name
    streams = methods.get(name).streams.values()
    views, trusted = config.augment.num_views, config.trusted.batch_size
    if any(stream.views is ALL_VIEWS for stream in streams):
        if views < 2:
            raise UserError(
                f"augment.num_views: got {views}, but method.name={name} needs at least 2 (the standard view and a "
                f"strong one)"
            )
    elif views != USUAL_VIEWS:
        raise UserError(
            f"augment.num_views={views}, but method.name={name} does not read it, for it has one view: set it to "
            f"{USUAL_VIEWS}"
        )
    if trusted not in (0, config.batch_size) and all(stream.size == "batch_size" for stream in streams):
        raise UserError(
            f"trusted.batch_size={trusted}, but method.name={name} does not read it, for it has no trusted batches "
            f"beside the others: set it to 0"
        )
    if not (config.ema.warmup or config.ema.decay):
        raise UserError("ema.warmup=False, but ema.decay=0 keeps no average that could be warmed up: set it to True")
