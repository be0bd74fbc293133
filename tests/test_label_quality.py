"""On data drawn from the model itself, whose truth is known, and on an example worked out by hand."""

import numpy as np
import pytest

from ieg_jax import label_quality

UNIFORM = np.where(np.eye(4, dtype=bool), 0.7, 0.1)
BY_CLASS = np.array([[0.6, 0.4, 0, 0], [0.35, 0.65, 0, 0], [0, 0, 1.0, 0], [0, 0, 0.2, 0.8]])


def draw(n, transition, seed=0, temperature=1.0):
    """The network's probabilities, true classes and given labels; the truth is drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(len(transition), 0.2), n)
    true = (truth.cumsum(1) > rng.random((n, 1))).argmax(1)
    given = (transition[true].cumsum(1) > rng.random((n, 1))).argmax(1)
    return label_quality.sharpen(truth, 1 / temperature), true, given


@pytest.mark.parametrize("transition, by_class", [(UNIFORM, False), (BY_CLASS, True)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_what_was_drawn_is_found(transition, by_class, temperature):
    probabilities, true, given = draw(20_000, transition, 0, temperature)
    held_out, held_out_true, _ = draw(300, transition, 1, temperature)
    found = label_quality.estimate(probabilities, given, held_out, held_out_true)
    is_right = given == true
    assert found.by_class == by_class
    np.testing.assert_allclose(found.transition, transition, atol=0.06)
    assert np.log2(found.temperature) == pytest.approx(np.log2(temperature), abs=0.36)  # steps of 1/4, and the prior
    low, high = found.noise_interval
    assert low < found.noise_rate < high and high - low < 0.15
    assert low - 0.01 < 1 - is_right.mean() < high + 0.01
    assert label_quality.calibration_error(label_quality.binned(found.right, is_right)) < 0.03
    bins = label_quality.reliability(found, held_out, held_out_true)
    assert label_quality.calibration_error(bins) < 0.06
    assert sum(weight for *_, weight in bins) == pytest.approx(300)


def test_the_posterior_by_hand():
    """Two classes, T known from many examples: q = (0.8, 0.2), T = ((0.9, 0.1), (0.4, 0.6))."""
    transition = np.array([[0.9, 0.1], [0.4, 0.6]])
    prior = np.array([[0.8, 0.2]])
    for given, right in ((0, 0.8 * 0.9 / (0.8 * 0.9 + 0.2 * 0.4)), (1, 0.2 * 0.6 / (0.8 * 0.1 + 0.2 * 0.6))):
        quality = label_quality.Quality(*[None] * 3, transition, True, 0.0, (0, 0), 1.0, 1)
        bins = label_quality.reliability(quality, prior, np.array([given]))
        # The pair with the true label `given` has the weight T[given, given] and this P(right).
        own = [(p, t) for p, t, w in bins if t > 0]
        assert own == [(pytest.approx(right), pytest.approx(1.0))]


def test_suggestions_are_what_else_it_could_be():
    probabilities, true, given = draw(5_000, UNIFORM)
    found = label_quality.estimate(probabilities, given)
    assert (found.suggested != given).all()
    others = probabilities.copy()
    others[np.arange(len(given)), given] = -1
    np.testing.assert_array_equal(found.suggested, others.argmax(1))  # with uniform noise T favours none of them
    wrong = given != true
    assert (found.suggested[wrong] == true[wrong]).mean() > 0.8
    assert (found.right + found.confidence <= 1 + 1e-6).all()
    best = 1 - label_quality.estimate(probabilities, np.argmax(probabilities, 1)).noise_rate
    assert best > 0.8, "labels that the network agrees with are not called wrong"


def test_without_held_out_examples_the_prior_and_a_wide_interval():
    probabilities, _, given = draw(5_000, UNIFORM)
    alone = label_quality.estimate(probabilities, given)
    held_out, held_out_true, _ = draw(200, UNIFORM, 1)
    helped = label_quality.estimate(probabilities, given, held_out, held_out_true)
    assert (alone.num_held_out, helped.num_held_out) == (0, 200)
    assert np.log2(alone.temperature) == pytest.approx(label_quality.PRIOR_MEAN)
    widths = [np.diff(found.noise_interval)[0] for found in (alone, helped)]
    assert widths[0] > 1.5 * widths[1]


def test_temperature_weights_by_hand():
    """One example, two classes with p = 1/2: every temperature gives 1/2, the prior is left."""
    prior = label_quality.temperature_weights(None, None)
    same = label_quality.temperature_weights(np.array([[0.5, 0.5]]), np.array([0]))
    np.testing.assert_allclose(same, prior)
    two = np.round(np.log2(label_quality.TEMPERATURES), 6)
    assert prior.sum() == pytest.approx(1) and two[prior.argmax()] == pytest.approx(-0.25)
    at = {t: prior[list(two).index(t)] for t in (-0.25, 0.5)}
    assert np.log(at[-0.25] / at[0.5]) == pytest.approx(0.5 * (0.75 / 0.35) ** 2)


def test_bins_by_hand():
    bins = label_quality.binned(np.array([0.05, 0.07, 0.95, 1.0]), np.array([False, True, True, True]))
    assert bins == [(pytest.approx(0.06), 0.5, 2.0), (pytest.approx(0.975), 1.0, 2.0)]
    assert label_quality.calibration_error(bins) == pytest.approx((0.44 * 2 + 0.025 * 2) / 4)


def test_a_class_without_examples_and_one_that_is_certain():
    probabilities = np.array([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0, 0], [0.9, 0.1, 0]])
    found = label_quality.estimate(probabilities, np.array([0, 1, 0, 0]))
    assert np.isfinite(found.right).all() and (found.right > 0.9).all()
    np.testing.assert_allclose(found.transition.sum(1), 1)


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        (np.ones((3, 2)) / 2, np.array([0, 1]), r"shape \(3, 2\) and labels \(2,\)"),
        (np.ones((2, 2)) / 2, np.array([0, 2]), "0 to 2, expected 0 to 1"),
        (np.ones((0, 2)), np.array([], int), "n > 0"),
    ],
)
def test_what_cannot_be_estimated(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        label_quality.estimate(probabilities, labels)
