"""Label noise that depends on the image: the instance-dependent noise of Xia et al. 2020, Part-dependent Label Noise.

Example i has a flip rate q_i of its own, from N(rate, 0.1²) truncated to [0, 1]. With x_i its standardised pixels
`[D]`, c its true class, and for each class a matrix W_c `[D, K]` of standard normal numbers, its label becomes j ≠ c
with probability q_i · softmax_{j ≠ c}(x_i W_c)_j. As ‖x_i‖ is near √D, one class has nearly all of that softmax.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict
from scipy.special import ndtr, ndtri

from ieg_jax.data.selection import DRAW, FLIP_RATE, SELECT, TABLES, draw, uniforms
from ieg_jax.data.splits import Source, Split
from ieg_jax.errors import UserError

DEVIATION = 0.1  # of the flip rates
NUMBERS_AT_ONCE = 2**24  # pixels that are in memory as float64 at the same time


def corrupt(source: Source, noise: ConfigDict) -> Split:
    """The training set with instance-dependent noise, which is computed in float64.

    Raises:
      UserError: for images that are not in memory.
    """
    train, num_classes = source.train, source.num_classes
    if not train.in_memory:
        raise UserError(
            f"noise.kind=instance_dependent needs the pixels of all images of {source.name} in memory, and they are "
            f"decoded when they are needed; set data.image_size to decode and resize them while loading"
        )
    rates = flip_rates(noise.rate, uniforms(noise.seed, FLIP_RATE, train.ids))
    flips = (train.clean_labels >= 0) & (uniforms(noise.seed, SELECT, train.ids) < rates)
    drawn = uniforms(noise.seed, DRAW, train.ids)
    mean, deviation = channel_statistics(train.images)
    size = int(np.prod(train.images.shape[1:]))
    labels = train.labels.copy()
    for label in np.unique(train.clean_labels[flips]):
        projection = _normals(noise.seed, TABLES + int(label), size * num_classes).reshape(size, num_classes)
        rows = np.flatnonzero(flips & (train.clean_labels == label))
        rows = rows[np.argsort(train.ids[rows])]  # whatever the order of the rows, sums are rounded alike
        for part in _parts(rows, size):
            features = ((train.images[part] - mean) / deviation).reshape(len(part), size)
            labels[part] = draw(_softmax_of_others(features @ projection, label), drawn[part])
    return dataclasses.replace(train, labels=labels)


def flip_rates(rate: float, u: np.ndarray) -> np.ndarray:
    """Flip rates from numbers u in [0, 1), by the inverse distribution function of N(rate, 0.1²) truncated to [0, 1].

    Where `rate` is within 0.2 of 0 or 1, truncation moves the mean: with a rate of 0.1 it is 0.13. A rate of 0 means no
    noise at all.

    Args:
      rate: in [0, 1].
      u: `[n]` float64.

    Returns:
      `[n]` float64.
    """
    if rate == 0:
        return np.zeros_like(u)
    low, high = ndtr((0 - rate) / DEVIATION), ndtr((1 - rate) / DEVIATION)
    return np.clip(rate + DEVIATION * ndtri(low + u * (high - low)), 0, 1)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, `[C]` float64; the deviation of a constant channel counts as 1."""
    count = images.size // images.shape[-1]
    total = squares = 0.0
    for part in _parts(np.arange(len(images)), images.size // len(images)):
        pixels = images[part].astype(np.float64)
        total, squares = total + pixels.sum((0, 1, 2)), squares + (pixels**2).sum((0, 1, 2))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean, np.where(deviation > 1e-6, deviation, 1)  # a smaller deviation is a rounding error


def _softmax_of_others(logits: np.ndarray, label: int) -> np.ndarray:
    """The softmax over all classes but `label`, not normalised, for `draw` does that; changes `logits`."""
    logits[:, label] = -np.inf
    return np.exp(logits - logits.max(1, keepdims=True))


def _normals(seed: int, stream: int, count: int) -> np.ndarray:
    """Standard normal numbers `[count]`."""
    u = uniforms(seed, stream, np.arange(count))
    return ndtri(np.maximum(u, 2.0**-54))  # u = 0 would give −∞


def _parts(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows in parts whose images, of `size` numbers each, fit in memory as float64."""
    at_once = max(1, NUMBERS_AT_ONCE // size)
    return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
