"""From a configuration to the data of a run: source, noise, trusted set, validation part."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.data import cleaned, features, selection
from ieg_jax.data import trusted as trusted_set
from ieg_jax.data.features import Features
from ieg_jax.data.noise import kinds
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import UNKNOWN, Split, joined, narrow_range
from ieg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run works on.

    Attributes:
      train: the noisy training set, without trusted and validation examples.
      trusted: the trusted set, interleaved by class, without its part that is held out.
      held_out: that part (`trusted.holdout`), or None.
      evaluation: accuracy is measured on it; None where the data have no test set and no trusted image is held out.
      evaluation_name: `test`, `validation` or `held_out`.
      name, num_classes, class_names: of the data set.
      noise_report, trusted_report: contents of noise.json and trusted.json.
      noisy_labels: `[N]` labels of the whole training set after noise, trusted and validation examples included, in
        the order of the ids.
      left_out: name -> what is wrong with it, for each image that is listed and not used.
      image_size: pixels of a side to which images were resized; 0 = they are as they came.
      features: how features were made of the images (`config.backbone`), which the splits then have as `pictures`; or
        None.
      notices: see `splits.Source`.
    """

    train: Split
    trusted: Split
    held_out: Split | None
    evaluation: Split | None
    evaluation_name: str
    name: str
    num_classes: int
    class_names: tuple[str, ...]
    noise_report: dict
    trusted_report: dict
    noisy_labels: np.ndarray
    left_out: dict[str, str]
    image_size: int
    features: Features | None = None
    notices: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name: train, trusted, held_out and `evaluation_name`."""
        splits = {
            "train": self.train,
            "trusted": self.trusted,
            "held_out": self.held_out,
            self.evaluation_name: self.evaluation,
        }
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def facts(self) -> config_lib.Facts:
        """What `config.resolve` needs to know to fill in the keys that are AUTO."""
        side = min(self.train.images.shape[1:3]) if self.train.in_memory else None
        return config_lib.Facts(len(self.train), self.image_size, side)

    def fingerprint(self) -> dict[str, str]:
        """A hash of the ids, names, labels and, if in memory, images of each split; a resumed run compares them.

        Features that were made of images do not count: another machine computes others, but for rounding.
        """
        return {name: _hash(split) for name, split in self.splits.items()}


def load_data(config: ConfigDict, quiet: bool = False) -> Data:
    """Loads the data, takes the trusted and the validation examples out, and adds the noise.

    Args:
      config: the configuration. It is not changed: `config.resolve` fills in keys that are AUTO, from `Data.facts`.
      quiet: whether nothing is shown of features that are computed.

    Raises:
      UserError: see `sources.load.load`, `noise.kinds.corrupt` and `trusted.split_trusted`; and where
        data.validation_size or data.train_size asks for more examples than there are.
    """
    source = sources.load(config.data)
    notices = list(source.notices)
    if source.train.in_memory and not source.train.is_features:
        notices += filter(None, [narrow_range(source.train.images)])
    if config.noise.kind != "none" and (source.train.clean_labels == UNKNOWN).all():
        # Noise starts from true labels. Where none is known, the given labels are taken to be true.
        source = dataclasses.replace(source, train=dataclasses.replace(source.train, clean_labels=source.train.labels))
    source = dataclasses.replace(source, train=kinds.corrupt(source, config.noise))
    train, trusted = trusted_set.split_trusted(source, config.trusted)
    num_removed, left_out = len(source.train) - len(train), dict(source.left_out)
    if source.trusted_is_pool and config.trusted.source == "separate":
        trusted, bad = sources.open_images(trusted, config.data, source.image_size)
        left_out |= bad
    whole_trusted = trusted
    trusted, held_out = trusted_set.hold_out(trusted, config.trusted)
    evaluation, evaluation_name = source.test, "test"
    if evaluation is None and held_out is not None:
        evaluation, evaluation_name = held_out, "held_out"
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    if file := config.data.get("cleaned", ""):
        train = cleaned.apply(train, file, names)
    if config.data.validation_size:
        train, evaluation = _hold_out(train, config.data.validation_size)
        evaluation_name = "validation"
    if config.data.train_size:
        train = _subset(train, config.data.train_size)
    noisy = train
    if config.trusted.join:
        train = joined(train, _as_training_examples(trusted, train))
    if config.data.folds:
        train = train.take(np.flatnonzero(fold_of(train.ids, config.data.folds) != config.data.fold))
    data = Data(
        train=train,
        trusted=trusted,
        held_out=held_out,
        evaluation=evaluation,
        evaluation_name=evaluation_name,
        name=source.name,
        num_classes=source.num_classes,
        class_names=names,
        noise_report=kinds.report(noisy, config.noise, source.num_classes),
        trusted_report=trusted_set.report(whole_trusted, config.trusted, num_removed, held_out),
        noisy_labels=source.train.labels[np.argsort(source.train.ids)],
        left_out=left_out,
        image_size=source.image_size,
        notices=tuple(notices),
    )
    return _as_features(data, config.backbone, quiet) if uses_backbone(config) else data


Load = Callable[[ConfigDict, bool], Data]  # `load_data`, or what does the same


class LoadOnce:
    """`load_data` that keeps what it loaded last, for runs in one process that differ in their methods alone."""

    READS = ("data", "noise", "trusted", "backbone")  # groups of the configuration that `load_data` reads

    def __init__(self):
        self._asked, self._data = "", None

    def __call__(self, config: ConfigDict, quiet: bool = False) -> Data:
        """See `load_data`."""
        asked = json.dumps([config[group].to_dict() for group in self.READS])
        if asked != self._asked:
            self._asked, self._data = "", None  # before others take as much memory
            self._data, self._asked = load_data(config, quiet), asked
        return self._data


def uses_backbone(config: ConfigDict) -> bool:
    """Whether a run is one on features that are made of images; older runs do not know of these."""
    return bool(config.get("backbone", {}).get("name", ""))


def _as_features(data: Data, group: ConfigDict, quiet: bool) -> Data:
    splits, made = features.replace_images(data.splits, group, quiet)
    return dataclasses.replace(
        data, features=made, train=splits["train"], trusted=splits["trusted"], held_out=splits.get("held_out"),
        evaluation=splits.get(data.evaluation_name),
    )  # fmt: skip


def fold_of(ids: np.ndarray, folds: int) -> np.ndarray:
    """Divides the examples with these ids into `folds` parts at random; returns the part of each, `[n]` int."""
    return (selection.uniforms(0, selection.FOLD, ids) * folds).astype(int)


def _hold_out(train: Split, size: int) -> tuple[Split, Split]:
    """The training set without `size` examples whose true label is known, and those with that label."""
    candidates = np.flatnonzero(train.clean_labels >= 0)
    if size > len(candidates) or size >= len(train):
        raise UserError(
            f"data.validation_size={size}, but there are {len(train)} training examples, "
            f"{len(candidates)} of them with a known label; lower it"
        )
    rows = candidates[
        np.argsort(selection.uniforms(0, selection.VALIDATION, train.ids[candidates]), kind="stable")[:size]
    ]
    held_out = train.take(rows)
    held_out = dataclasses.replace(held_out, labels=held_out.clean_labels)
    return train.take(np.setdiff1d(np.arange(len(train)), rows)), held_out


def _subset(train: Split, size: int) -> Split:
    """`size` examples of the training set; a larger size keeps all examples that a smaller one keeps."""
    if size > len(train):
        raise UserError(
            f"data.train_size={size}, but without trusted and validation examples {len(train)} are left; lower it"
        )
    order = np.argsort(selection.uniforms(0, selection.SUBSET, train.ids), kind="stable")
    return train.take(np.sort(order[:size]))


def _as_training_examples(trusted: Split, train: Split) -> Split:
    """Trusted examples with ids that no training example has."""
    ids = trusted.ids
    if np.isin(ids, train.ids).any():
        ids = ids + max(train.ids) + 1
    unknown = np.full_like(trusted.labels, UNKNOWN)
    clean = unknown if (train.clean_labels == UNKNOWN).all() else trusted.labels
    return dataclasses.replace(trusted, ids=ids, clean_labels=clean, given_labels=unknown)


def _hash(split: Split) -> str:
    digest = hashlib.sha256("\n".join(split.names).encode("utf-8", "surrogateescape"))
    shown = split.images if split.pictures is None else split.pictures
    for column in (split.ids, split.labels, split.clean_labels, *([shown] if isinstance(shown, np.ndarray) else [])):
        digest.update(np.ascontiguousarray(column))
    return digest.hexdigest()
