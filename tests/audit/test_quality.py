"""On data drawn from the model itself, whose truth is known, and on an example worked out by hand."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.stats import spearmanr

from ieg_jax.audit import quality as label_quality

UNIFORM = np.where(np.eye(4, dtype=bool), 0.7, 0.1)
BY_CLASS = np.array([[0.6, 0.4, 0, 0], [0.35, 0.65, 0, 0], [0, 0, 1.0, 0], [0, 0, 0.2, 0.8]])


def draw(n, transition, seed=0, temperature=1.0):
    """The network's probabilities, true classes and given labels; the truth is drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(len(transition), 0.2), n)
    true = (truth.cumsum(1) > rng.random((n, 1))).argmax(1)
    given = (transition[true].cumsum(1) > rng.random((n, 1))).argmax(1)
    return sharpen(truth, 1 / temperature), true, given


def sharpen(probabilities, temperature):
    k = probabilities.shape[1]
    return label_quality.calibrated(probabilities, temperature, np.zeros((k, k + 1)))


@pytest.mark.parametrize("transition, by_class", [(UNIFORM, False), (BY_CLASS, True)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_what_was_drawn_is_found(transition, by_class, temperature):
    probabilities, true, given = draw(20_000, transition, 0, temperature)
    held_out, held_out_true, _ = draw(300, transition, 1, temperature)
    found = label_quality.estimate(probabilities, given, held_out, held_out_true)
    is_right = given == true
    assert found.by_class == by_class
    np.testing.assert_allclose(found.transition, transition, atol=0.06)
    scale = (1 + np.trace(found.correction) / 4) / found.temperature  # the correction takes a part of it
    assert np.log2(scale) == pytest.approx(-np.log2(temperature), abs=0.36)  # steps of 1/4, and the prior
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
        quality = label_quality.Quality(*[None] * 3, transition, True, 0.0, (0, 0), 1.0, np.zeros((2, 3)), 1)
        bins = label_quality.reliability(quality, prior, np.array([given]))
        # The pair with the true label `given` has the weight T[given, given] and this P(right).
        own = [(p, t) for p, t, w in bins if t > 0]
        assert own == [(pytest.approx(right), pytest.approx(1.0))]


def test_suggestions_are_what_else_it_could_be():
    probabilities, true, given = draw(5_000, UNIFORM)
    found = label_quality.estimate(probabilities, given)
    assert (found.suggested != given).all()
    others = label_quality.calibrated(probabilities, found.temperature, found.correction)
    others[np.arange(len(given)), given] = -1
    np.testing.assert_array_equal(found.suggested, others.argmax(1))  # with uniform noise T favours none of them
    wrong = given != true
    assert (found.suggested[wrong] == true[wrong]).mean() > 0.8
    assert (found.right + found.confidence <= 1 + 1e-6).all()
    best = 1 - label_quality.estimate(probabilities, np.argmax(probabilities, 1)).noise_rate
    assert best > 0.8, "labels that the network agrees with are not called wrong"


def test_the_confidence_is_the_posterior_of_the_suggestion():
    """P(c | x, y) ∝ q(c | x) T[c, y], of the suggested class c, which differs from 1 − P(right) with four classes."""
    probabilities, _, given = draw(5_000, UNIFORM)
    found = label_quality.estimate(probabilities, given)
    posterior = label_quality.calibrated(probabilities, found.temperature, found.correction)
    posterior = posterior * found.transition[:, given].T
    posterior /= posterior.sum(1, keepdims=True)
    rows = np.arange(len(given))
    np.testing.assert_allclose(found.right, posterior[rows, given], atol=0.01)
    np.testing.assert_allclose(found.confidence, posterior[rows, found.suggested], atol=0.01)
    assert np.abs(found.confidence - (1 - found.right)).max() > 0.1


def test_of_many_examples_some_with_their_own_labels(monkeypatch):
    """The correction and τ are found on a part of the examples, and each of these keeps its label."""
    order = np.argsort(draw(3_000, UNIFORM)[2], kind="stable")  # so that other labels would be those of one class
    probabilities, true, given = (array[order] for array in draw(3_000, UNIFORM))
    whole = label_quality.estimate(probabilities, given)
    monkeypatch.setattr(label_quality, "EXAMPLES", 1_000)
    some = label_quality.estimate(probabilities, given)
    assert np.abs(some.correction - whole.correction).max() > 1e-6, "others were looked at"
    assert some.noise_rate == pytest.approx((given != true).mean(), abs=0.03)
    assert np.abs(some.right - whole.right).mean() < 0.05
    part = np.linspace(0, 2_999, 1_000).astype(int)
    alone = label_quality.estimate(probabilities[part], given[part])
    np.testing.assert_allclose(some.correction, alone.correction, atol=1e-9, err_msg="that of the part alone")


def test_the_interval_by_hand():
    """95 % of one normal distribution: 1.96 deviations on either side."""
    rates, deviations, weights = np.array([np.nan, 0.3]), np.array([np.nan, 0.02]), np.array([0.0, 1.0])
    low, high = label_quality._interval(rates, deviations, weights)
    assert (low, high) == (pytest.approx(0.3 - 1.96 * 0.02, abs=1e-3), pytest.approx(0.3 + 1.96 * 0.02, abs=1e-3))


def test_without_held_out_examples_the_prior_and_a_wide_interval():
    probabilities, _, given = draw(5_000, UNIFORM)
    alone = label_quality.estimate(probabilities, given)
    held_out, held_out_true, _ = draw(200, UNIFORM, 1)
    helped = label_quality.estimate(probabilities, given, held_out, held_out_true)
    assert (alone.num_held_out, helped.num_held_out) == (0, 200)
    assert abs(np.log2(alone.temperature) - label_quality.PRIOR_MEAN) <= 0.25  # the given labels move it a little
    widths = [np.diff(found.noise_interval)[0] for found in (alone, helped)]
    assert widths[0] > 1.5 * widths[1]


def test_temperature_weights_by_hand():
    """One example, two classes with p = 1/2: every temperature gives 1/2, and the prior is left: N(−1/4, 0.35²) and, of
    the given labels, N(−1, 0.75²)."""
    prior = label_quality.temperature_weights(0.5, None, None, np.zeros((2, 3)))
    same = label_quality.temperature_weights(0.5, np.array([[0.5, 0.5]]), np.array([0]), np.zeros((2, 3)))
    np.testing.assert_allclose(same, prior)
    two = np.round(np.log2(label_quality.TEMPERATURES), 6)
    assert prior.sum() == pytest.approx(1) and two[prior.argmax()] == pytest.approx(-0.5)  # the mean is −0.384
    at = {t: prior[list(two).index(t)] for t in (-0.25, 0.5)}
    assert np.log(at[-0.25] / at[0.5]) == pytest.approx(0.5 * (0.75 / 0.35) ** 2 + 0.5 * (2**2 - 1**2))


def test_calibrated_by_hand():
    """K = 2, τ = 2, p = (0.8, 0.2): A takes half of the first logit from itself, b adds log 3 to the second."""
    correction = np.array([[-0.5, 0, 0], [0, 0, np.log(3)]])
    found = label_quality.calibrated(np.array([[0.8, 0.2]]), 2.0, correction)
    first, second = 0.8**0.25, 3 * 0.2**0.5
    np.testing.assert_allclose(found, [[first / (first + second), second / (first + second)]], rtol=1e-12)


def test_the_gradient_of_the_correction():
    """Against finite differences; and at 0 and T = I by hand: q − 1[y], times the logits."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)), rng.integers(0, 4, 20)
    transition = rng.dirichlet(np.ones(4), 4)
    correction = rng.normal(size=(4, 5)) / 10

    def value(flat):
        return label_quality.correction_loss(flat.reshape(4, 5), logits, labels, transition)[0]

    expected = approx_fprime(correction.ravel(), value, 1e-6).reshape(4, 5)
    found = label_quality.correction_loss(correction, logits, labels, transition)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    zero, at_zero = label_quality.correction_loss(np.zeros((4, 5)), logits, labels, np.eye(4))
    np.testing.assert_allclose(at_zero[:, 4], (q - np.eye(4)[labels]).sum(0))
    assert zero == pytest.approx(-np.log(q[np.arange(20), labels]).sum())


@pytest.mark.parametrize("transition", [UNIFORM, BY_CLASS])
def test_a_network_that_prefers_some_classes_is_corrected(transition):
    """The network's logits are those of the truth, mixed and shifted. Corrected, P(right) is nearly as good as with the
    truth itself, and where the network is right the correction is next to nothing."""
    honest, true, given = draw(20_000, transition)
    rng = np.random.default_rng(5)
    bias, mix = np.array([0.8, -0.8, 0.5, -0.5]), np.eye(4) + 0.15 * rng.normal(size=(4, 4))
    logits = np.log(np.clip(honest, 1e-6, None)) @ mix.T + bias
    biased = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    held_out, held_out_true, _ = draw(100, transition, 1)
    held_logits = np.log(np.clip(held_out, 1e-6, None)) @ mix.T + bias
    held_biased = np.exp(held_logits) / np.exp(held_logits).sum(1, keepdims=True)

    best = label_quality.estimate(honest, given, held_out, held_out_true)
    found = label_quality.estimate(biased, given, held_biased, held_out_true)
    assert np.abs(best.correction).max() < 0.15 and np.abs(found.correction).max() > 0.3

    def measures(quality):
        known = label_quality.judge(quality.right, quality.suggested, given, true)
        return np.array([known["auroc"], known["precision"], known["suggested_right"]])

    def without(probabilities):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(label_quality, "CORRECTED_CLASSES", 3)
            return label_quality.estimate(probabilities, given, held_biased, held_out_true)

    plain = without(biased)
    assert not plain.correction.any(), "more classes than are corrected"
    gain, possible = measures(found) - measures(plain), measures(best) - measures(plain)
    assert (gain > 0.5 * possible).all() and (possible > 0.004).all(), (gain, possible)
    error = label_quality.calibration_error(label_quality.binned(found.right, given == true))
    assert error < 0.04 and abs(found.noise_rate - (given != true).mean()) < 0.03


def test_where_no_label_seems_wrong_the_order_is_still_that_of_the_network():
    """The network says what was given, for all but a few with some doubt."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 2_000)
    doubt = rng.permutation(np.linspace(0.02, 0.3, len(labels)))
    probabilities = np.where(np.eye(4, dtype=bool)[labels], 1 - doubt[:, None], doubt[:, None] / 3)
    found = label_quality.estimate(probabilities, labels)
    assert found.noise_rate < 1e-4 and spearmanr(found.right, doubt)[0] < -0.99


def test_pooled_by_hand():
    pooled = label_quality.pooled([np.array([[0.9, 0.1]]), np.array([[0.5, 0.5]])])
    np.testing.assert_allclose(pooled, [[0.75, 0.25]], rtol=1e-6)  # √0.45 : √0.05 = 3 : 1


@pytest.mark.parametrize("temperature", [0.35, 0.7, 1.4])
def test_the_given_labels_measure_the_temperature(temperature, monkeypatch):
    """On data of the model to within two steps of the grid; so that without held-out examples less is missed."""
    probabilities, true, given = draw(5_000, UNIFORM, 3, temperature)
    assert abs(np.log2(label_quality._measured_temperature(probabilities, given) / temperature)) <= 0.5
    found = label_quality.estimate(probabilities, given)
    monkeypatch.setattr(label_quality, "GIVEN_DEVIATION", 1e3)
    prior_alone = label_quality.estimate(probabilities, given)
    rate = (given != true).mean()
    assert abs(found.noise_rate - rate) < max(0.02, abs(prior_alone.noise_rate - rate))


def test_few_examples_do_not_correct_much():
    probabilities, _, given = draw(30, UNIFORM)
    assert np.abs(label_quality.estimate(probabilities, given).correction).max() < 0.25


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
