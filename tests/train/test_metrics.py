import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from ieg_jax.train import metrics
from ieg_jax.train.metrics import WeightedAverage


def test_weighted_average_by_hand():
    first = WeightedAverage.of(jnp.array([1.0, 3.0]), jnp.array([0.25, 0.75]))
    assert first.compute() == pytest.approx(2.5)
    both = first + WeightedAverage.of(jnp.array([10.0]), jnp.array([1.0]))
    assert both.compute() == pytest.approx((0.25 + 2.25 + 10) / 2)
    assert WeightedAverage.of(jnp.array([jnp.nan]), jnp.array([0.0])).compute() is None, "nothing counted"


def test_what_does_not_count_may_be_nan():
    assert WeightedAverage.of(jnp.array([jnp.nan, 2.0]), jnp.array([0.0, 1.0])).compute() == 2.0


def test_accuracy_by_hand():
    logits = jnp.array([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [jnp.nan] * 3])
    label = jnp.array([1, 1, 0, 0])
    assert metrics.accuracy(logits, label).compute() == pytest.approx(1 / 4)
    assert metrics.accuracy(logits, label, top=2).compute() == pytest.approx(2 / 4)
    assert metrics.accuracy(logits, label, jnp.array([1.0, 0, 0, 0])).compute() == 1.0
    assert metrics.accuracy(jnp.zeros((2, 3)), jnp.array([0, 1])).compute() == 0.5, "a tie is no hit for both"


def test_auroc_by_hand():
    # pairs (clean, noisy): 0.9 > 0.5, 0.9 > 0.1, 0.4 < 0.5, 0.4 > 0.1 -> 3 of 4
    weights, clean = np.array([0.9, 0.4, 0.5, 0.1, 7.0]), np.array([1, 1, 0, 0, -1])
    assert metrics.detection_auroc(weights, clean) == pytest.approx(0.75)
    assert metrics.detection_auroc(weights[:2], clean[:2]) is None


def test_window_averages_and_finds_the_first_bad_step():
    def observation(loss, weights):
        return metrics.Observation(
            {"loss": WeightedAverage.of(jnp.asarray(loss)), "fine": WeightedAverage.of(jnp.asarray(1.0))},
            metrics.Examples(jnp.array([3, 5]), jnp.asarray(weights), jnp.array([1, 0], jnp.int8)),
        )

    window = metrics.empty_window(jax.eval_shape(lambda: observation(1.0, [0.5, 0.5])), steps=4)
    window = metrics.add(window, observation(1.0, [0.9, 0.1]), jnp.asarray(5))
    window = metrics.add(window, observation(3.0, [0.8, 0.2]), jnp.asarray(6))
    host = jax.device_get(window)
    assert metrics.first_bad(host) is None
    assert metrics.summarize(host) == {"loss": 2.0, "fine": 1.0, "weight/auroc": 1.0}
    examples = metrics.window_examples(host)
    np.testing.assert_allclose(examples.weights, [0.9, 0.1, 0.8, 0.2])
    assert examples.ids.tolist() == [3, 5, 3, 5] and examples.clean.tolist() == [1, 0, 1, 0] and examples.trust is None
    window = metrics.add(window, observation(np.nan, [0.8, 0.2]), jnp.asarray(7))
    window = metrics.add(window, observation(np.inf, [0.8, 0.2]), jnp.asarray(8))
    assert metrics.first_bad(jax.device_get(window)) == (7, ["loss"])


def test_balanced_accuracy_is_that_of_scikit_learn():
    """Of classes of 30, 3 and 7 examples and one of none, in two parts; a class without an example does not count."""
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1, 2], [30, 3, 7])
    scores = rng.normal(size=(40, 4)) + 1.5 * np.eye(4)[label]
    expected = balanced_accuracy_score(label, scores.argmax(1))
    order = rng.permutation(40)
    parts = [metrics.balanced_accuracy(jnp.asarray(scores[rows]), label[rows]) for rows in np.split(order, [25])]
    assert sum(parts[1:], parts[0]).compute() == pytest.approx(expected)
    assert expected != pytest.approx(np.mean(scores.argmax(1) == label), abs=0.01)
    none = metrics.balanced_accuracy(jnp.full((3, 4), jnp.nan), jnp.array([0, 1, 1]), jnp.array([1.0, 1.0, 0.0]))
    assert none.compute() == 0, "nan is never right"
    assert metrics.balanced_accuracy(jnp.zeros((2, 4)), jnp.array([0, 1]), 0.0).compute() is None
