"""Which row of a split stands at which position of a stream of examples.

Each function here makes another: positions, int64 `[]` or `[n]`, -> rows of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.lazy import tf

RowOf = Callable[["tf.Tensor"], "tf.Tensor"]


def shuffled_rows(config: ConfigDict, stream: int, size: int, labels: np.ndarray) -> RowOf:
    """Each epoch shows every row once, in an order of its own."""
    del labels
    return lambda position: _shuffle(position % size, config, stream, position // size, size)


def balanced_rows(config: ConfigDict, stream: int, size: int, labels: np.ndarray) -> RowOf:
    """For a set that is interleaved by class.

    The rows come in their order, again and again, or with `trusted.shuffle` shuffled inside each class in each epoch.
    """
    if not config.trusted.shuffle:
        return lambda position: position % size
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    first = np.cumsum(counts) - counts
    rank = np.empty(size, np.int64)  # place of a row among the rows of its class
    rank[by_class] = np.arange(size) - np.repeat(first, counts)

    def row_of(position):
        epoch, row = position // size, position % size
        label = tf.gather(labels, row)
        number = epoch * len(counts) + tf.cast(label, tf.int64)
        shuffled = _shuffle(tf.gather(rank, row), config, stream, number, tf.gather(counts, label))
        return tf.gather(by_class, tf.gather(first, label) + shuffled)

    return row_of


def rows_by_turns(config: ConfigDict, stream: int, size: int, labels: np.ndarray, shuffled: bool) -> RowOf:
    """The classes take turns whatever their sizes are, so that rows of a small class come more often.

    Each pass over a class shows each of its rows once, in an order of its own where `shuffled`.
    """
    del size
    _, number_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_class, first = np.argsort(number_of, kind="stable"), np.cumsum(counts) - counts

    def row_of(position):
        turn, number = position // len(counts), position % len(counts)
        count = tf.gather(counts, number)
        place = turn % count
        if shuffled:
            place = _shuffle(place, config, stream, turn // count * len(counts) + number, count)
        return tf.gather(by_class, tf.gather(first, number) + place)

    return row_of


def _shuffle(index: tf.Tensor, config: ConfigDict, stream: int, number: tf.Tensor, size: tf.Tensor | int) -> tf.Tensor:
    """Where permutation `number` of 0 … `size` − 1 has `index`."""
    run = tf.zeros_like(number) + (config.seed * 16 + stream)
    key = tf.cast(tf.stack([run, number], -1) % 2**32, tf.uint32)
    # tf.random.experimental.index_shuffle, which puts this word before each key, and of several before the first alone.
    key = tf.concat([tf.zeros_like(key[..., :1]) + 498247692, key], -1)
    last = tf.zeros_like(index) + tf.cast(size, index.dtype) - 1
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=key, max_index=last, rounds=4)
