"""Configurations: typed arguments, the paper/authors switch, validation, durations, comparison."""

import dataclasses
import functools
import math
import pathlib
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

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
    "meta.weight_decay_on": ("all", "loss"),
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

# Of own data p and k are smaller than the paper's 5 and 20: in a short training of a few thousand examples these drown
# the trusted loss, and one class takes over another.
OWN_DATA = {"unlabeled_weight": 1.0, "consistency_weight": 2.0}
FEATURES_AUGMENT = ("gaussian(0.1)", "gaussian(0.3)")  # standard, strong; features have a deviation of 1
FINETUNE_RATE = 0.05
BACKBONE_VIEWS = 4  # see backbone.views: a photograph, and three random crops of it, mirrored at random
FEATURES_BATCH, FEATURES_RATE, FEATURES_DEPTH = 256, 0.1, 2
KEPT = 10  # checkpoints of own data, evenly spread over training: an audit takes the mean of their predictions

# Keys that may be AUTO: `resolve` puts what suits the data in its place.
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
    "model.convolutions",
    "eval_batch_size",
    "checkpoint",
    "audit.suspects",
    "profile.",
    "backbone.cache",
    "wandb.",
    "stall_minutes",
)

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def find_file(path: str) -> str:
    """The file that `--config` names, without the arguments behind the colon.

    A path `configs/...` that does not exist from here is that of the repository or of the installed package. Their
    files import one another as `configs.default`, which is made possible where it is not.

    Args:
      path: as given.
    """
    here = pathlib.Path(__file__).resolve().parent
    if path.startswith("configs/") and not pathlib.Path(path).exists():
        found = next((folder / path for folder in (here.parent, here) if (folder / path).is_file()), None)
        path = str(found) if found else path
    folder = pathlib.Path(path).resolve().parent
    if (folder / "default.py").is_file() and "configs" not in sys.modules:
        module = types.ModuleType("configs")
        module.__path__ = [str(folder)]
        sys.modules["configs"] = module
    return path


def parse_arguments(text: str, **defaults: Any) -> types.SimpleNamespace:
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
    return types.SimpleNamespace(**values)


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


@dataclasses.dataclass(frozen=True)
class Check:
    """What a value must be.

    Attributes:
      holds: value -> whether it is allowed.
      expected: completes the sentence "got 3, expected ...".
      choices: the allowed values where they are names, for a hint at a mistyped one.
    """

    holds: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration that belongs to the module which reads it.

    Attributes:
      default: its value in configs/default.py.
      check: what is allowed.
      comment: what it means, with its unit; a sentence for the docs.
    """

    default: Any
    check: Check
    comment: str


def at_least(lowest: float, instead: str = "") -> Check:
    """A number of this size or more; `instead` replaces the words of the message."""
    return _number(lambda value: value >= lowest, instead or f"at least {lowest:g}")


def above(bound: float) -> Check:
    """A number greater than `bound`."""
    return _number(lambda value: value > bound, f"above {bound:g}")


def within(low: float, high: float, open_end: bool = False) -> Check:
    """A number in [low, high], or in [low, high) with `open_end`."""
    if open_end:
        return _number(lambda value: low <= value < high, f"in [{low:g}, {high:g})")
    return _number(lambda value: low <= value <= high, f"in [{low:g}, {high:g}]")


def number(holds: Callable[[Any], bool], expected: str) -> Check:
    """A finite number with a condition of its own."""
    return _number(holds, expected)


def one_of(*choices: str) -> Check:
    """One of these names."""
    return Check(lambda value: value in choices, f"one of {', '.join(choices)}", choices)


boolean = Check(lambda value: isinstance(value, bool), "True or False")


def _number(holds: Callable[[Any], bool], expected: str) -> Check:
    def test(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and bool(holds(value))

    return Check(test, expected)


def check_values(group: ConfigDict, checks: Mapping[str, Check], prefix: str = "") -> None:
    """Raises UserError for the first value that its check does not allow.

    Args:
      group: the configuration, or a group of it.
      checks: by the flat keys of the group.
      prefix: of these keys in the whole configuration, such as `data.`.
    """
    for key, check in checks.items():
        name, value = f"{prefix}{key}", get(group, key)
        automatic = name in AUTOMATIC and value == AUTO
        if check.holds(value) or automatic:
            continue
        if check.choices:
            check_choice(name, value, check.choices)
        besides = f", or {AUTO} (from the data)" if name in AUTOMATIC else ""
        raise UserError(f"{name}: got {value!r}, expected {check.expected}{besides}")


def check_unread(
    group: ConfigDict,
    unset: Mapping[str, Any],
    reads: Mapping[str, Collection[str]],
    chooser: str,
    prefix: str = "",
) -> None:
    """Raises UserError for a key that is set and that nothing reads.

    Args:
      group: the configuration, or a group of it.
      unset: flat key of the group -> the value that it has where nobody sets it.
      reads: each choice of `chooser` -> the keys that it reads.
      chooser: the key of the group that decides who reads, such as `method.name`.
      prefix: of these keys in the whole configuration.
    """
    choice = get(group, chooser)
    for key, usual in unset.items():
        name, value = f"{prefix}{key}", get(group, key)
        # The argument `reference` sets its keys whatever the method and the network are.
        allowed = (usual, *REFERENCE.get(name, ()), *((AUTO,) if name in AUTOMATIC else ()))
        value = tuple(value) if isinstance(value, list) else value  # what a config.json has for a tuple
        if key in reads[choice] or value in allowed:
            continue
        readers = ", ".join(name for name, keys in reads.items() if key in keys)
        raise UserError(
            f"{name}={value!r}, but {prefix}{chooser}={choice} does not read it: set it to {usual!r}, or set "
            f"{prefix}{chooser} to one that reads it ({readers})"
        )


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the data say about themselves, from which AUTO keys follow.

    Attributes:
      num_examples: N, of the noisy training set.
      image_size: pixels of a side to which images were resized while they were loaded; 0 = they are as they came.
      smallest_side: pixels of the shorter side of the images in memory, 1 for features; None where each image has a
        size of its own.
    """

    num_examples: int
    image_size: int
    smallest_side: int | None


def follow_data(config: ConfigDict, learning_rate: float) -> None:
    """Sets what the configurations for own data share: length and network by the data, and what suits short trainings.

    Args:
      config: from configs/default.py, with the group `model` as it is to be.
      learning_rate: the highest one.
    """
    config.num_train_epochs = config.eval_every_epochs = config.checkpoint_every_epochs = float(AUTO)
    config.checkpoint.keep = KEPT
    config.schedule.name = "cosine"  # which ends at the last step, however many there are
    config.schedule.base_lr = learning_rate


def follow_features(config: ConfigDict) -> None:
    """Sets what trainings on features share, ready-made or by a backbone: the network, its views and its length."""
    config.batch_size, config.eval_batch_size = FEATURES_BATCH, 4096
    follow_data(config, FEATURES_RATE)
    config.model.name, config.model.depth = "mlp", FEATURES_DEPTH
    config.augment.standard, config.augment.strong = FEATURES_AUGMENT


def follow_backbone(config: ConfigDict, name: str, mirrored: bool = True) -> None:
    """Sets what trainings on features of a backbone share.

    Args:
      config: from configs/default.py.
      name: of the backbone.
      mirrored: whether the mirror image of an image is one of its class too.
    """
    config.backbone.name, config.backbone.views = name, BACKBONE_VIEWS
    crop = "random_resized_crop({size},smallest=0.5)"
    config.backbone.augment = f"{crop}|flip" if mirrored else crop
    follow_features(config)


def follow_finetuning(config: ConfigDict, name: str, size: int, augment: str) -> None:
    """Sets what suits a training from the weights of a package: the head first, then all layers, the lower slower.

    Args:
      config: from configs/default.py.
      name: of the network.
      size: pixels of a side of what it sees.
      augment: one of AUGMENT_PRESETS.
    """
    follow_data(config, FINETUNE_RATE)
    config.model.name, config.model.pretrained = name, "imagenet"
    flip = "" if augment == "symbols" else "|flip"
    config.augment.standard = f"random_resized_crop({size},smallest=0.5){flip}"
    config.augment.strong = f"random_resized_crop({size},smallest=0.2){flip}|{AUGMENT_PRESETS[augment][1]}"
    config.augment.views_of = "original"
    config.augment.evaluation = f"resize({size})|center_crop({size})"
    config.finetune.update({"body_rate": 0.1, "layer_decay": 0.9, "probe_epochs": 1.0})


# Longer trainings of own data learn wrong labels and the few trusted examples by heart; networks of features sooner.
USUAL_EPOCHS, FEWEST_STEPS, MOST_STEPS = 40.0, 500, 20_000
FEATURES_EPOCHS, FEATURES_FEWEST_STEPS, FEATURES_MOST_STEPS = 20.0, 300, 1_500
FINETUNE_EPOCHS, FINETUNE_FEWEST_STEPS = 5.0, 200
SMALL = 24  # pixels; images below it get the small network


def resolve(config: ConfigDict, facts: Facts | None = None) -> ConfigDict:
    """A copy of the configuration in which values stand that follow from others, or from the data.

    `trusted.batch_size` 0 becomes `batch_size`. With facts, keys that are AUTO become what suits the data. The
    training: 40 epochs, but no fewer than 500 and no more than 20,000 steps; of features 20 epochs, but no fewer than
    300 and no more than 1,500 steps; from weights (`model.pretrained`) 5 epochs, but no fewer than 200 steps; evaluated
    20 times, saved 10 times. The network: depth 10 and width 1 for images below 24 pixels, depth 16 and width 2 from
    there on.

    Args:
      config: is not changed.
      facts: of the data; None = they are not loaded yet, and AUTO stays.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    config.trusted.batch_size = config.trusted.batch_size or config.batch_size
    if facts is None:
        return config
    if config.data.image_size == AUTO:
        config.data.image_size = facts.image_size
    steps_per_epoch = facts.num_examples / config.batch_size
    if config.num_train_epochs == AUTO:
        if facts.smallest_side == 1:
            usual, fewest, most = FEATURES_EPOCHS, FEATURES_FEWEST_STEPS, FEATURES_MOST_STEPS
        elif config.model.pretrained:
            usual, fewest, most = FINETUNE_EPOCHS, FINETUNE_FEWEST_STEPS, MOST_STEPS
        else:
            usual, fewest, most = USUAL_EPOCHS, FEWEST_STEPS, MOST_STEPS
        steps = min(max(usual * steps_per_epoch, fewest), most)
        config.num_train_epochs = steps / steps_per_epoch
    epochs = duration(config, "num_train", steps_per_epoch) / steps_per_epoch
    if config.eval_every_epochs == AUTO:
        config.eval_every_epochs = epochs / 20
    if config.checkpoint_every_epochs == AUTO:
        config.checkpoint_every_epochs = epochs / 10
    small = facts.smallest_side is not None and facts.smallest_side < SMALL
    if config.model.depth == AUTO:
        config.model.depth = 10 if small else 16
    if config.model.width == AUTO:
        config.model.width = 1.0 if small else 2.0
    return config


# Keys of which a compiled program knows nothing: the random numbers and the data are its arguments.
UNCOMPILED = (
    "seed", "data", "noise", "backbone", "trusted.seed", "trusted.ids", "trusted.holdout", "class_weight", "wandb",
)  # fmt: skip
# Keys that the work folders of older versions lack -> what these runs did.
ADDED = {
    "budget": "steps",
    "class_weight": "none",
    "data.transfer": "float32",
    "backbone.name": "",
    "finetune.body_rate": 1.0,
    "finetune.layer_decay": 1.0,
    "finetune.probe_epochs": 0.0,
    "meta.weight_decay_on": "loss",
    "model.convolutions": "auto",
    "trusted.join": False,
    "schedule.warmup_epochs": 0.0,
}


def completed(config: dict) -> ConfigDict:
    """The configuration of a run, as it was written down, with the keys that older versions lacked (ADDED)."""
    complete = ConfigDict(config)
    for key, value in ADDED.items():
        *groups, name = key.split(".")
        group = complete
        for part in groups:
            group = group.setdefault(part, ConfigDict()) if part not in group else group[part]
        if name not in group:
            group[name] = value
    return complete


def of_program(config: ConfigDict) -> FrozenConfigDict:
    """The configuration without UNCOMPILED, so that no program depends on these; equal ones make equal programs."""
    config = ConfigDict(config.to_dict())
    for key in UNCOMPILED:
        *groups, name = key.split(".")
        group = functools.reduce(lambda group, part: group[part], groups, config)
        if name in group:  # older runs lack some
            del group[name]
    return FrozenConfigDict(config)


def duration(config: ConfigDict, name: str, steps_per_epoch: float) -> int:
    """Returns the duration `name` (one of DURATIONS) in steps, rounded, at least 1.

    Args:
      config: the configuration.
      name: without its suffix, e.g. `num_train` or `schedule.first_cycle`.
      steps_per_epoch: steps that show each noisy training example once.

    Raises:
      UserError: for a duration that is AUTO still.
    """
    check_duration(config, name)
    if get(config, f"{name}_epochs") == AUTO:
        raise UserError(f"{name}_epochs={AUTO} is for data that are loaded first; set a number of epochs")
    steps = get(config, f"{name}_steps") or get(config, f"{name}_epochs") * steps_per_epoch
    return max(1, round(steps))


def differences(old: dict, new: dict) -> list[str]:
    """Returns `key: old -> new` for every leaf in which two nested dicts differ, those of FREE left out.

    Nor is a key named that is AUTO in `new`: from the same data it will be what it is in `old`.
    """
    old, new = flatten(old), flatten(new)
    old = {key: value for key, value in ADDED.items() if key in new} | old
    if not old.get("backbone.name"):  # nothing reads the rest of the group
        old, new = ({k: v for k, v in keys.items() if k in ADDED or k[:9] != "backbone."} for keys in (old, new))
    old = {key: AUTO if key in AUTOMATIC and new.get(key) == AUTO else value for key, value in old.items()}
    missing = "(no such key)"
    return [
        f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing) and not key.startswith(FREE)
    ]


def get(config: ConfigDict, key: str) -> Any:
    """The value of a flat key such as `data.name`."""
    for part in key.split("."):
        config = config[part]
    return config


def check_duration(config: ConfigDict, name: str) -> None:
    """Raises UserError unless exactly one of `<name>_steps` and `<name>_epochs` is above 0."""
    for unit in ("steps", "epochs"):
        value = get(config, f"{name}_{unit}")
        automatic = f"{name}_{unit}" in AUTOMATIC and value == AUTO
        if not (math.isfinite(value) and (value >= 0 or automatic)):
            raise UserError(f"{name}_{unit}: got {value!r}, expected a number above 0, or 0 for not set")
    steps, epochs = get(config, f"{name}_steps"), get(config, f"{name}_epochs")
    if bool(steps) == bool(epochs):
        raise UserError(
            f"exactly one of {name}_steps and {name}_epochs must be above 0, got {steps!r} and {epochs!r}; "
            f"set the other to 0"
        )


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dicts as one dict with flat keys such as `data.name`."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
