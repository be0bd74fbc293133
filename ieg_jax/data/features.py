"""The features of a run on a backbone: in place of the images of its data, standardised by its training set."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data.backbone import BATCH, Backbone, backbone_of, policy_of
from ieg_jax.data.feature_cache import AT_ONCE, DTYPE, cache_of, features_of, pixels_of
from ieg_jax.data.sources.arrays import feature_statistics, standardised
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError

VIEWED = ("train", "trusted")  # the splits that get views


@dataclasses.dataclass(frozen=True)
class Features:
    """How a run makes features of images: by a backbone, standardised by the training set.

    Attributes:
      backbone: the network.
      mean, deviation: float64 `[D]`, of the features of the training set, see `sources.arrays.features`.
    """

    backbone: Backbone
    mean: np.ndarray
    deviation: np.ndarray

    def of(self, split: Split) -> Split:
        """A split of images with features in their place, which are not kept; one of features stays as it is."""
        if split.is_features:
            return split
        parts = [np.arange(start, min(start + AT_ONCE, len(split))) for start in range(0, len(split), AT_ONCE)]
        values = [self.backbone.features(pixels_of(split, rows, self.backbone.size)) for rows in parts]
        return self.put(split, np.concatenate(values).astype(DTYPE)[:, None])

    def of_features(self, split: Split, others: "Features") -> Split:
        """A split of features that were standardised by others, standardised by these."""
        values = split.images[:, 0, 0] * others.deviation + others.mean
        return dataclasses.replace(split, images=standardised(values, self.mean, self.deviation), views=None)

    def put(self, split: Split, values: np.ndarray) -> Split:
        """Features `[n, V, D]` in place of images."""
        first, *others = (standardised(values[:, view], self.mean, self.deviation) for view in range(values.shape[1]))
        views = np.stack(others, 1) if others else None
        return dataclasses.replace(split, images=first, views=views, pictures=split.images)

    def apply(self, variables: Any, pixels: jax.Array) -> jax.Array:
        """A pure function: images, see `Backbone.apply` -> what the head of the run takes, `[n, 1, 1, D]`."""
        values = self.backbone.apply(variables, pixels)
        values = values.astype(DTYPE).astype(jnp.float32)  # as they are kept
        scaled = (values - self.mean.astype(np.float32)) / self.deviation.astype(np.float32)
        return scaled[:, None, None]

    def to_json(self) -> dict[str, Any]:
        """What a run writes down, to find the same features again."""
        return {"about": dict(self.backbone.about), "mean": self.mean.tolist(), "deviation": self.deviation.tolist()}


def of_run(group: ConfigDict, about: Mapping[str, Any]) -> Features:
    """The features of a run.

    Args:
      group: `backbone` of its configuration.
      about: from `Features.to_json`.

    The weights are read when they are first needed; others than those of the run are a UserError then.
    """
    backbone = backbone_of(group, about["about"])
    return Features(backbone, np.array(about["mean"]), np.array(about["deviation"]))


@dataclasses.dataclass(frozen=True)
class Trial:
    """What some of the images of a run say about the features of all.

    Attributes:
      count: images and views whose features there will be.
      seconds: that they will take here, where none is kept yet.
      width: D.
    """

    count: int
    seconds: float
    width: int


def try_out(splits: Mapping[str, Split], backbone: ConfigDict) -> Trial:
    """Times the backbone with some of the images of a run, in memory or in files.

    Args:
      splits: as for `replace_images`.
      backbone: the group of the configuration.
    """
    network, train = Backbone(backbone), splits["train"]
    rows = np.resize(np.arange(len(train)), 2 * BATCH * len(jax.local_devices()))
    network.features(pixels_of(train, rows[:1], network.size))  # compiled before the time is taken
    began = time.monotonic()
    found = network.features(pixels_of(train, rows, network.size))
    each = (time.monotonic() - began) / len(rows)
    count = sum(len(split) * (backbone.views if name in VIEWED else 1) for name, split in splits.items())
    return Trial(count, each * count, found.shape[1])


def replace_images(
    splits: Mapping[str, Split], backbone: ConfigDict, quiet: bool = False
) -> tuple[dict[str, Split], Features]:
    """The splits of a run with features in place of images.

    Args:
      splits: one of them is `train`, by which features are standardised. It and `trusted` get the views.
      backbone: the group of the configuration.
      quiet: whether nothing is shown.

    Raises:
      UserError: for features, which have no images, and see `features_of`.
    """
    if splits["train"].is_features:
        raise UserError(f"backbone.name={backbone.name}, but the data are features, not images; set it to ''")
    network = backbone_of(backbone)
    cache, views = cache_of(network, backbone.cache), dict.fromkeys(VIEWED, backbone.views)
    values = features_of(splits, network, cache, views, policy_of(backbone), quiet=quiet)
    features = Features(network, *feature_statistics(values["train"][:, 0]))
    return {name: features.put(split, values[name]) for name, split in splits.items()}, features
