"""Configurations: typed arguments, the paper/authors switch, validation, durations, comparison."""

import math
import re
from types import SimpleNamespace
from typing import Any

import jax
from ml_collections import ConfigDict

from ieg_jax.errors import UserError, check_choice

# Where the paper and the authors' released code differ: key -> (authors, paper). The default configuration has
# the authors' values, which produced the published numbers, with one exception: the meta-gradient does not flow
# through the pseudo labels, as in the paper, which saves a good part of a step.
REFERENCE = {
    "method.normalize_logits": (True, False),
    "method.supervised_scale": (0.5, 1.0),
    "method.mixup_coefficient": ("approximate", "exact"),
    "meta.pseudo_label_gradient": (True, False),
    "meta.weight_decay": (True, False),
    "model.variant": ("authors", "standard"),
    "trusted.shuffle": (False, True),
}

# Each is given as <name>_steps or <name>_epochs, exactly one of them.
DURATIONS = ("num_train", "log_every", "eval_every", "checkpoint_every", "schedule.first_cycle")

# Presets for one's own images -> augment.standard, augment.strong. Symbols must be neither mirrored nor turned.
AUGMENT_PRESETS = {
    "photos": ("crop(pad=4)|flip", "randaugment(2,5)|cutout(0.4)"),
    "grey": ("crop(pad=4)|flip", "affine(rotate=15,shear=0.1,zoom=0.1,translate=0.1)|intensity(0.2)|cutout(0.4)"),
    "symbols": ("crop(pad=2)", "affine(shear=0.1,zoom=0.1,translate=0.1)|intensity(0.2)|cutout(0.3)"),
}

# Keys that may be AUTO: what suits the data, which `pipeline.load` puts in their place (`pipeline.fit_to_data`).
AUTO = -1
AUTOMATIC = (
    "data.image_size",
    "model.depth",
    "model.width",
    "num_train_epochs",
    "eval_every_epochs",
    "checkpoint_every_epochs",
)

# Keys that say how a run is computed and watched, not what: they may change from one start of a run to the next.
# Each is a key, or the beginning of several.
FREE = (
    "mesh.",
    "microbatches",
    "model.remat",
    "eval_batch_size",
    "checkpoint",
    "audit.suspects",
    "profile.",
    "stall_minutes",
)

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_arguments(text: str, **defaults: Any) -> SimpleNamespace:
    """Parses the part behind the colon of `--config=configs/x.py:noise_rate=0.4,method=l2r`.

    Args:
      text: `name=value` pairs separated by commas; may be empty.
      **defaults: the known arguments. The type of a default (str, int, float or bool) is the argument's type.

    Returns:
      A namespace with one attribute for each default.

    Raises:
      UserError: for an unknown or repeated argument (the known ones are listed) and a value of another type.
    """
    values = dict(defaults)
    seen = set()
    for pair in filter(None, (text or "").split(",")):
        name, separator, value = (part.strip() for part in pair.partition("="))
        known = ", ".join(f"{key} (default {default!r})" for key, default in defaults.items())
        if not separator:
            raise UserError(f"config argument {pair!r}: expected name=value; known arguments: {known}")
        if name not in defaults:
            raise UserError(f"unknown config argument {name!r}; known arguments: {known}")
        if name in seen:
            raise UserError(f"config argument {name!r} is given twice in {text!r}")
        seen.add(name)
        kind = type(defaults[name])
        try:
            values[name] = _BOOLEANS[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UserError(f"config argument {name}: got {value!r}, expected {kind.__name__}") from None
    return SimpleNamespace(**values)


def apply_reference(config: ConfigDict, reference: str) -> None:
    """Sets every key on which the paper and the authors' code differ.

    Args:
      config: changed in place.
      reference: `authors` or `paper` set all keys of REFERENCE; `default` leaves them alone.

    Raises:
      UserError: for another value.
    """
    check_choice("config argument reference", reference, ("default", "authors", "paper"))
    if reference != "default":
        config.update_from_flattened_dict(
            {key: values[0 if reference == "authors" else 1] for key, values in REFERENCE.items()}
        )


def validate(config: ConfigDict) -> None:
    """Checks every value that can be judged without the data.

    Raises:
      UserError: naming the key, the value and what is allowed.
    """
    from ieg_jax import methods, models, optimizers, schedules  # they import this module's errors
    from ieg_jax.data import augment, corruption, probe, sources
    from ieg_jax.models import pretrained

    choices = {
        "data.name": sources.REGISTRY,
        "data.unreadable": ("refuse", "skip"),
        "noise.kind": corruption.KINDS,
        "noise.selection": corruption.SELECTIONS,
        "trusted.source": ("train", "separate"),
        "model.name": models.REGISTRY,
        "model.variant": ("authors", "standard"),
        "model.dtype": ("float32", "bfloat16", "float64"),
        "model.conventions": ("own", "torch", "flax"),
        "method.name": methods.REGISTRY,
        "method.mixup_coefficient": ("approximate", "exact"),
        "augment.views_of": ("standard", "original"),
        "optimizer.name": optimizers.NAMES,
        "optimizer.weight_decay_on": ("all", "kernels"),
        "schedule.name": schedules.NAMES,
        "checkpoint.best_mode": ("max", "min"),
    }
    for key, allowed in choices.items():
        check_choice(key, _get(config, key), allowed)

    bounds = {  # key: (test, what is expected)
        "batch_size": (lambda v: v >= 1, "at least 1"),
        "batch_groups": (lambda v: v >= 1, "at least 1"),
        "microbatches": (lambda v: v >= 1, "at least 1"),
        "eval_batch_size": (lambda v: v >= 1, "at least 1"),
        "data.image_size": (lambda v: v >= 0, "0 or a number of pixels"),
        "data.num_classes": (lambda v: v == 0 or v >= 2, "0 (from the data) or at least 2"),
        "data.validation_size": (lambda v: v >= 0, "0 or a number of examples"),
        "data.train_size": (lambda v: v >= 0, "0 (all) or a number of examples"),
        "noise.rate": (lambda v: 0 <= v <= 1, "a share in [0, 1]"),
        "noise.seed": (lambda v: v >= 0, "at least 0"),
        "seed": (lambda v: v >= 0, "at least 0"),
        "trusted.seed": (lambda v: v >= 0, "at least 0"),
        "trusted.per_class": (lambda v: v >= 1, "at least 1: every method is judged with a trusted set"),
        "data.folds": (lambda v: v == 0 or v >= 2, "0 or at least 2"),
        "data.fold": (lambda v: 0 <= v < max(1, config.data.folds), "0 to data.folds - 1"),
        "trusted.holdout": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "trusted.batch_size": (lambda v: v >= 0, "0 (as batch_size) or a number of images"),
        "model.depth": (lambda v: v >= 1, "at least 1"),
        "model.width": (lambda v: v > 0, "above 0"),
        "method.temperature": (lambda v: v > 0, "above 0"),
        "method.unlabeled_weight": (lambda v: v >= 0, "at least 0"),
        "method.unlabeled_ramp_steps": (lambda v: v >= 0, "0 (none) or a number of steps"),
        "method.consistency_weight": (lambda v: v >= 0, "at least 0"),
        "method.threshold": (lambda v: v >= 0, "at least 0"),
        "method.label_trust_init": (lambda v: 0 <= v <= 1, "in [0, 1]"),
        "method.supervised_scale": (lambda v: v > 0, "above 0"),
        "method.mixup_alpha": (lambda v: v > 0, "above 0"),
        "meta.learning_rate": (lambda v: v > 0, "above 0"),
        "optimizer.momentum": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "optimizer.weight_decay": (lambda v: v >= 0, "at least 0"),
        "schedule.base_lr": (lambda v: v > 0, "above 0"),
        "schedule.cycle_mult": (lambda v: v >= 1, "at least 1"),
        "schedule.peak_mult": (lambda v: 0 < v <= 1, "in (0, 1]"),
        "schedule.step_factor": (lambda v: 0 < v < 1, "in (0, 1)"),
        "ema.decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
        "mesh.data": (lambda v: v == -1 or v >= 1, "-1 (all devices) or at least 1"),
        "mesh.fsdp": (lambda v: v >= 1, "at least 1"),
        "checkpoint.keep": (lambda v: v >= 1, "at least 1"),
        "checkpoint.keep_every_steps": (lambda v: v >= 0, "0 or a number of steps"),
        "checkpoint.keep_best": (lambda v: v >= 0, "0 or a number of checkpoints"),
        "audit.epochs": (lambda v: v >= 0, "at least 0"),
        "audit.suspects": (lambda v: v >= 0, "0 (none) or a number of examples"),
        "profile.start_step": (lambda v: v >= 0, "0 or a step, counted from 1"),
        "profile.num_steps": (lambda v: v >= 1, "at least 1"),
        "stall_minutes": (lambda v: v >= 0, "0 or a number of minutes"),
    }
    for key, (test, expected) in bounds.items():
        value = _get(config, key)
        automatic = key in AUTOMATIC and value == AUTO
        if not (isinstance(value, int | float) and math.isfinite(value) and (test(value) or automatic)):
            besides = f", or {AUTO} (from the data)" if key in AUTOMATIC else ""
            raise UserError(f"{key}: got {value!r}, expected {expected}{besides}")

    for name in DURATIONS:
        _check_duration(config, name)

    for key in ("batch_size", "trusted.batch_size"):
        if _get(config, key) % config.batch_groups:
            raise UserError(
                f"{key}={_get(config, key)} is not a multiple of batch_groups={config.batch_groups}; change one of them"
            )

    boundaries = tuple(config.schedule.step_boundaries)
    if not all(isinstance(b, int) and b > 0 for b in boundaries) or list(boundaries) != sorted(set(boundaries)):
        raise UserError(f"schedule.step_boundaries: got {boundaries}, expected increasing whole numbers above 0")

    if config.model.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("model.dtype=float64: set the environment variable JAX_ENABLE_X64=1, without it jax has none")
    if config.batch_groups % config.microbatches:
        raise UserError(
            f"microbatches={config.microbatches} does not divide batch_groups={config.batch_groups}: batch norm and "
            f"mixup work inside a group, so a part of the batch must be a whole number of groups; change one of them"
        )

    if config.method.name in ("eg", "mixmatch") and not config.method.mixup:
        raise UserError(
            f"method.mixup: got False, but method.name={config.method.name} has no use of the trusted images besides "
            f"mixup"
        )
    if config.method.mixup_coefficient == "approximate" and config.method.mixup_alpha != 0.5:
        raise UserError(
            f"method.mixup_alpha: got {config.method.mixup_alpha!r}, but method.mixup_coefficient=approximate stands "
            f"for Beta(1/2, 1/2) alone; set method.mixup_coefficient=exact"
        )

    pretrained.validate(config.model)
    corruption.validate(config.noise)
    probe.validate(config.trusted)

    for key in ("augment.standard", "augment.strong", "augment.evaluation"):
        augment.parse_policy(_get(config, key), key)
    if config.augment.num_views < 1:
        raise UserError(f"augment.num_views: got {config.augment.num_views}, expected at least 1")
    if "views" in methods.REGISTRY[config.method.name].NEEDS and config.augment.num_views < 2:
        raise UserError(
            f"augment.num_views: got {config.augment.num_views}, but method.name={config.method.name} "
            f"needs at least 2 (the standard view and a strong one)"
        )
    try:
        re.compile(config.meta.layers)
    except re.error as error:
        raise UserError(f"meta.layers: {config.meta.layers!r} is no regular expression: {error}") from None


def duration(config: ConfigDict, name: str, steps_per_epoch: float) -> int:
    """Returns the duration `name` (one of DURATIONS) in steps, rounded, at least 1.

    Args:
      config: the configuration.
      name: without its suffix, e.g. `num_train` or `schedule.first_cycle`.
      steps_per_epoch: steps that show each noisy training example once.

    Raises:
      UserError: for a duration that is AUTO still.
    """
    _check_duration(config, name)
    if _get(config, f"{name}_epochs") == AUTO:
        raise UserError(f"{name}_epochs={AUTO} is for data that are loaded first; set a number of epochs")
    steps = _get(config, f"{name}_steps") or _get(config, f"{name}_epochs") * steps_per_epoch
    return max(1, round(steps))


def differences(old: dict, new: dict) -> list[str]:
    """Returns `key: old -> new` for every leaf in which two nested dicts differ, those of FREE left out.

    Nor is a key named that is AUTO in `new`: from the same data it will be what it is in `old`.
    """
    old, new = _flatten(old), _flatten(new)
    old = {key: AUTO if key in AUTOMATIC and new.get(key) == AUTO else value for key, value in old.items()}
    missing = "(no such key)"
    return [
        f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing) and not key.startswith(FREE)
    ]


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _check_duration(config: ConfigDict, name: str) -> None:
    for unit in ("steps", "epochs"):
        value = _get(config, f"{name}_{unit}")
        automatic = f"{name}_{unit}" in AUTOMATIC and value == AUTO
        if not (math.isfinite(value) and (value >= 0 or automatic)):
            raise UserError(f"{name}_{unit}: got {value!r}, expected a number above 0, or 0 for not set")
    steps, epochs = _get(config, f"{name}_steps"), _get(config, f"{name}_epochs")
    if bool(steps) == bool(epochs):
        raise UserError(
            f"exactly one of {name}_steps and {name}_epochs must be above 0, got {steps!r} and {epochs!r}; "
            f"set the other to 0"
        )


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
