"""Random numbers of many examples at once."""

import numpy as np
import pytest
import tensorflow as tf

from ieg_jax.data import draws
from ieg_jax.data.draws import Places


def places(first, count, *key):
    return Places(tf.constant(first, tf.int64), count, (7, *key))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 1, 5), (1, 1, 1)])
def test_they_belong_to_a_position(shape):
    whole = draws.normals(places(100, 6), (6, *shape)).numpy()
    parts = [draws.normals(places(first, 2), (2, *shape)).numpy() for first in (100, 102, 104)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole)) == whole.size, "no number comes twice"
    numbers = draws.integers(places(2**40, 50), 1000).numpy()
    np.testing.assert_array_equal(draws.integers(places(2**40 + 30, 20), 1000).numpy(), numbers[30:])


def test_their_distribution():
    normal = draws.normals(places(0, 2000), (2000, 1, 1, 50)).numpy()
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01 and abs((normal**4).mean() - 3) < 0.1
    of_examples = normal[:, 0, 0]
    assert np.abs(np.corrcoef(of_examples[:, :10].T) - np.eye(10)).max() < 0.1
    assert abs(np.corrcoef(of_examples[1:].ravel(), of_examples[:-1].ravel())[0, 1]) < 0.02
    counts = np.bincount(draws.integers(places(0, 6000), 3).numpy(), minlength=3)
    assert counts.sum() == 6000 and (np.abs(counts - 2000) < 150).all()


def test_each_fold_draws_anew():
    """Folded with 0, too."""
    seed = places(5, 100)
    drawn = [
        draws.normals(one, (100, 1, 1, 4)).numpy().ravel()
        for one in (seed, *map(seed.fold, (0, 1)), places(5, 100, 1, 0))
    ]
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.2
    np.testing.assert_array_equal(
        draws.normals(draws.fold(seed, 3), (100, 4)), draws.normals(places(5, 100, 3), (100, 4))
    )
    assert draws.fold(Places(tf.constant(0, tf.int64), 1, (-1, 2)), 0).normals((4,)).shape == (1, 4), "a negative seed"


def test_of_one_example_they_are_tensorflows():
    seed = tf.constant([3, 4], tf.int64)
    np.testing.assert_array_equal(draws.normals(seed, (2, 3)), tf.random.stateless_normal((2, 3), seed))
    np.testing.assert_array_equal(draws.fold(seed, 5), tf.random.experimental.stateless_fold_in(seed, 5))
    assert 0 <= draws.integers(seed, 3).numpy() < 3
