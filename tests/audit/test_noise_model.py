"""On data drawn from the model itself, and on examples worked out by hand."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import expit

from ieg_jax.audit import noise_model
from ieg_jax.audit.measures import binned, calibration_error, judge
from ieg_jax.audit.noise_model import Fitter, NoiseModel
from tests.audit.draws import BY_CLASS, UNIFORM, draw, sharpen


def right_of(model, probabilities, given):
    return expit(np.concatenate([odds for _, odds, _ in noise_model.posterior_parts(model, probabilities, given)]))


@pytest.mark.parametrize("transition, by_class", [(UNIFORM, False), (BY_CLASS, True)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_what_was_drawn_is_found(transition, by_class, temperature):
    probabilities, true, given = draw(20_000, transition, 0, temperature)
    held_out, held_out_true, _ = draw(300, transition, 1, temperature)
    found = Fitter(probabilities, given).fit(held_out, held_out_true)
    assert found.by_class == by_class
    np.testing.assert_allclose(found.transition, transition, atol=0.06)
    scale = (1 + np.trace(found.correction) / 4) / found.temperature  # the correction takes a part of it
    assert np.log2(scale) == pytest.approx(-np.log2(temperature), abs=0.36)  # steps of 1/4, and the prior
    right = right_of(found, probabilities, given)
    assert calibration_error(binned(right, given == true)) < 0.03
    assert abs((1 - right).mean() - (given != true).mean()) < 0.03


def test_the_posterior_by_hand():
    """Two classes, q = (0.8, 0.2), T = ((0.9, 0.1), (0.4, 0.6)): odds 0.72 : 0.08 and 0.12 : 0.08."""
    model = NoiseModel(1.0, np.zeros((2, 3)), np.array([[0.9, 0.1], [0.4, 0.6]]), True)
    (rows, log_odds, others), *more = noise_model.posterior_parts(model, np.array([[0.8, 0.2]] * 2), np.array([0, 1]))
    assert (rows, more) == (slice(0, 2), [])
    np.testing.assert_allclose(log_odds, np.log([0.72 / 0.08, 0.12 / 0.08]), rtol=1e-5)
    np.testing.assert_array_equal(others, [[0, 1], [1, 0]])


def test_in_parts_as_at_once(monkeypatch):
    probabilities, _, given = draw(1_000, UNIFORM)
    whole = Fitter(probabilities, given).fit()
    expected = right_of(whole, probabilities, given)
    monkeypatch.setattr(noise_model, "AT_ONCE", 4 * 70)
    np.testing.assert_allclose(right_of(whole, probabilities, given), expected, rtol=1e-6)


def test_calibrated_by_hand():
    """K = 2, τ = 2, p = (0.8, 0.2): z = ±log 2, so z / τ = ±½ log 2; A takes half of the first, b adds log 3."""
    correction = np.array([[-0.5, 0, 0], [0, 0, np.log(3)]])
    found = noise_model.calibrated(np.array([[0.8, 0.2]]), 2.0, correction)
    first, second = 2**0.25, 3 * 2**-0.5
    np.testing.assert_allclose(found, [[first / (first + second), second / (first + second)]], rtol=1e-6)


def test_temperature_weights_by_hand():
    """One example, two classes with p = 1/2: every temperature gives 1/2, and the prior is left: N(−1/4, 1/2²) and, of
    the given labels, N(−1, 1/2²)."""
    prior = noise_model.temperature_weights(0.5, None, None, np.zeros((2, 3)))
    same = noise_model.temperature_weights(0.5, np.array([[0.5, 0.5]]), np.array([0]), np.zeros((2, 3)))
    np.testing.assert_allclose(same, prior)
    two = np.round(np.log2(noise_model.TEMPERATURES), 6)
    at = {t: prior[list(two).index(t)] for t in (-0.75, -0.5, 0.5)}
    assert prior.sum() == pytest.approx(1) and at[-0.75] == pytest.approx(at[-0.5])  # the mean is −0.625
    assert np.log(at[-0.5] / at[0.5]) == pytest.approx(2 * (0.75**2 + 1.5**2 - 0.25**2 - 0.5**2))


def test_the_given_labels_measure_the_temperature():
    """The network is right on 3 of 4 given labels: it should be sure of 15/16. p^(1/τ) : q^(1/τ) = 15 : 1 with p : q =
    ∛15 : 1 is at τ = 1/3, between 2^−1.5 and 2^−1.75."""
    ratio = 15 ** (1 / 3)
    probabilities = np.array([[ratio / (1 + ratio), 1 / (1 + ratio)]] * 4)
    found = noise_model.measured_temperature(probabilities, np.array([0, 0, 0, 1]))
    assert np.log2(found) in (-1.5, -1.75)


def test_the_gradient_of_the_correction():
    """Against finite differences; and at 0 and T = I by hand: q − 1[y], times the logits."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)), rng.integers(0, 4, 20)
    transition = rng.dirichlet(np.ones(4), 4)
    correction, deviations = rng.normal(size=(4, 5)) / 10, rng.random((4, 5)) + 0.1

    def value(flat):
        return noise_model.correction_loss(flat.reshape(4, 5), logits, labels, transition, deviations)[0]

    expected = approx_fprime(correction.ravel(), value, 1e-6).reshape(4, 5)
    found = noise_model.correction_loss(correction, logits, labels, transition, deviations)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    zero, at_zero = noise_model.correction_loss(np.zeros((4, 5)), logits, labels, np.eye(4), deviations)
    np.testing.assert_allclose(at_zero[:, 4], (q - np.eye(4)[labels]).sum(0))
    assert zero == pytest.approx(-np.log(q[np.arange(20), labels]).sum())


@pytest.mark.parametrize("transition", [UNIFORM, BY_CLASS])
def test_a_network_that_prefers_some_classes_is_corrected(transition, monkeypatch):
    """The network's logits are those of the truth, mixed and shifted. Corrected, P(right) is nearly as good as with the
    truth itself, and where the network is right the correction is next to nothing."""
    honest, true, given = draw(20_000, transition)
    rng = np.random.default_rng(5)
    bias, mix = np.array([0.8, -0.8, 0.5, -0.5]), np.eye(4) + 0.15 * rng.normal(size=(4, 4))

    def biased(probabilities):
        return noise_model.softmax(np.log(np.clip(probabilities, 1e-6, None)) @ mix.T + bias)

    held_out, held_out_true, _ = draw(100, transition, 1)

    def measures(probabilities, of_held_out):
        model = Fitter(probabilities, given).fit(of_held_out, held_out_true)
        right = right_of(model, probabilities, given)
        known = judge(right, given, given, true)
        return np.array([known["auroc"], known["precision"]]), np.abs(model.correction).max(), right

    best, nothing, _ = measures(honest, held_out)
    found, corrected, right = measures(biased(honest), biased(held_out))
    monkeypatch.setattr(noise_model, "CORRECTED_CLASSES", 3)
    plain, none, _ = measures(biased(honest), biased(held_out))
    assert nothing < 0.15 < 0.3 < corrected and none == 0, "more classes than are corrected"
    assert (found - plain > 0.5 * (best - plain)).all() and (best - plain > 0.004).all(), (found, plain, best)
    assert calibration_error(binned(right, given == true)) < 0.04


def test_few_examples_of_many_classes_are_not_corrected():
    """50 classes and 1,000 examples: the 2,550 numbers would fit what is by chance."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(50, 0.05), 1_000)
    given = (truth.cumsum(1) > rng.random((1_000, 1))).argmax(1)
    correction = Fitter(sharpen(truth, 1.0), given).fit().correction
    assert np.abs(correction).max() < 0.1


def test_maximisation_by_hand():
    """One round from T = ((0.7, 0.3), (0.3, 0.7)), two examples, both given 0, of which one is certainly 1."""
    seen = []

    def update(counts):
        seen.append(counts)
        return np.array([[0.5, 0.5], [0.5, 0.5]])

    likelihood, _ = noise_model.maximise(np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([0, 2, 2]), update)
    np.testing.assert_allclose(seen[0], [[0.7, 0], [0.3 + 1, 0]])  # P(true = 0 | …) = 0.35 / 0.5
    assert likelihood == pytest.approx(2 * np.log(0.5))


def test_fits_with_other_held_out_examples_share_what_is_the_same():
    probabilities, true, given = draw(3_000, UNIFORM)
    fitter = Fitter(probabilities, given)
    first, again = fitter.fit(probabilities[:50], true[:50]), fitter.fit(probabilities[:50], true[:50])
    assert first is again
    alone = Fitter(probabilities, given).fit(probabilities[50:200], true[50:200])
    later = fitter.fit(probabilities[50:200], true[50:200])
    assert alone.temperature == later.temperature
    np.testing.assert_array_equal(alone.correction, later.correction)
    np.testing.assert_array_equal(alone.transition, later.transition)


@pytest.mark.parametrize("truth", [UNIFORM, BY_CLASS])
def test_one_rate_needs_only_the_probability_of_the_given_class(truth):
    """Beside the general expectation-maximisation, whose counts are whole matrices."""
    probabilities, _, given = draw(3_000, truth, seed=2)
    order = np.argsort(given, kind="stable")
    ends = np.searchsorted(given[order], np.arange(5))
    expected = noise_model.maximise(probabilities[order], ends, noise_model.uniform_transition)
    likelihood, transition = noise_model.maximise_uniform(probabilities[np.arange(3_000), given], 4)
    assert likelihood == pytest.approx(expected[0], rel=1e-9)
    np.testing.assert_allclose(transition, expected[1], rtol=1e-6)


def test_the_second_model_is_not_fitted_where_no_labels_could_pay_for_it(monkeypatch):
    """With 60 classes its 3,540 parameters cost 3,540 · ½ log N; labels that are certain gain N log 60 at most."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 60, 2_000)
    sure = np.full((2_000, 60), 0.1 / 59)
    sure[np.arange(2_000), given] = 0.9
    monkeypatch.setattr(noise_model, "maximise", lambda *_: pytest.fail("was fitted"))
    assert noise_model.fit_transition(sure.__getitem__, given, 60)[1] is False
    probabilities, _, few = draw(2_000, BY_CLASS)
    with pytest.raises(pytest.fail.Exception, match="was fitted"):
        noise_model.fit_transition(probabilities.__getitem__, few, 4)
