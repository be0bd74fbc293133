"""Random numbers of the pipeline: a function of a seed and of an example's position, whoever draws them and when.

Of one example a seed is TensorFlow's stateless one, int64 `[2]`. `Places` stands for the seeds of many examples at
consecutive positions, and draws for all of them at once. Philox (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") is a function of a key and a counter, so each position has a part of the counter to itself, and what it
gets there does not depend on where a batch begins or on who draws its other parts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ieg_jax.lazy import tf

_PHILOX, _AT_A_TIME = 1, 4  # its number in TensorFlow; how many numbers of 32 bits a counter gives


@dataclasses.dataclass(frozen=True)
class Places:
    """In place of a seed: those of the examples at `count` positions from `first` on.

    Attributes:
      first: int64 `[]`.
      count: n.
      key: of the run, the stream, and what is drawn.
    """

    first: tf.Tensor
    count: int
    key: tuple[int, ...]

    def fold(self, number: int) -> Places:
        """For other numbers of the same examples."""
        return dataclasses.replace(self, key=(*self.key, number))

    def normals(self, shape: tuple[int, ...]) -> tf.Tensor:
        """Draws from N(0, 1), float32 `[n, *shape]`."""
        size = int(np.prod(shape))
        counters = -(-size // _AT_A_TIME)  # of an example
        drawn = tf.raw_ops.StatelessRandomNormalV2(
            shape=[self.count, counters * _AT_A_TIME], key=self._key(), counter=self._counter(counters), alg=_PHILOX
        )
        return tf.reshape(drawn[:, :size], [self.count, *shape])

    def integers(self, bound: int) -> tf.Tensor:
        """Draws from 0 … `bound` − 1, int32 `[n]`."""
        drawn = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=[self.count, _AT_A_TIME], key=self._key(), counter=self._counter(1), alg=_PHILOX, dtype=tf.uint32
        )
        return tf.cast(tf.cast(drawn[:, 0], tf.int64) % bound, tf.int32)

    def _key(self) -> tf.Tensor:
        # Numpy fills up with zeros, so that without its length a key would equal the one that is longer by a zero.
        entropy = [len(self.key), *(number % 2**64 for number in self.key)]
        return tf.constant(np.random.SeedSequence(entropy).generate_state(1, np.uint64))

    def _counter(self, counters: int) -> tf.Tensor:
        return tf.stack([tf.cast(self.first, tf.uint64) * counters, tf.constant(0, tf.uint64)])


Seed = "tf.Tensor | Places"


def fold(seed: Seed, number: int | tf.Tensor) -> Seed:
    """Another seed, for other numbers of the same example."""
    return seed.fold(number) if isinstance(seed, Places) else tf.random.experimental.stateless_fold_in(seed, number)


def normals(seed: Seed, shape: tuple[int, ...]) -> tf.Tensor:
    """Draws from N(0, 1) of this shape: of an example, or `[n, …]` of the examples of `Places`."""
    if isinstance(seed, Places):
        return seed.normals(shape[1:])
    return tf.random.stateless_normal(shape, seed)


def integers(seed: Seed, bound: int) -> tf.Tensor:
    """A draw from 0 … `bound` − 1, int32 `[]`, or `[n]`."""
    if isinstance(seed, Places):
        return seed.integers(bound)
    return tf.random.stateless_uniform([], seed, 0, bound, tf.int32)
