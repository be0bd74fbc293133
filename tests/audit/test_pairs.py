import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import expit

from ieg_jax.audit import pairs


def test_features_by_hand():
    """p = (0.7, 0.2, 0.1), given 1: the margin is log(0.2 / 0.7) / τ."""
    found = pairs.features(np.array([[0.7, 0.2, 0.1]]), np.array([1]), np.array([-40.0]), 0.5)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(found, [[-12, 2 * np.log(2 / 7), np.log(0.2), entropy]])


def test_laplace_against_the_integral():
    """One coefficient, whose posterior can be integrated: 3 of 4 right, prior N(0.5, 1.5²); two count as one."""
    design, is_right = np.ones((4, 1)), np.array([True, True, True, False])
    weights = np.array([0.5, 0.5, 1.0, 1.0])
    evidence, mode, covariance = pairs.laplace(design, is_right, weights, np.array([0.5]), np.array([1.5]))

    def log_joint(value):
        value = np.atleast_1d(value)[:, None]
        fit = (weights * np.where(is_right, np.log(expit(value)), np.log(expit(-value)))).sum(1)
        return fit - 0.5 * ((value[:, 0] - 0.5) / 1.5) ** 2 - np.log(1.5) - 0.5 * np.log(2 * np.pi)

    assert abs(approx_fprime(mode, lambda v: log_joint(v)[0], 1e-6)[0]) < 1e-3
    grid = np.linspace(-8, 9, 20_001)
    joint = np.exp(log_joint(grid))
    total = joint.sum() * (grid[1] - grid[0])
    assert evidence == pytest.approx(np.log(total), abs=0.05)
    mean = (grid * joint).sum() / joint.sum()
    assert covariance[0, 0] == pytest.approx(((grid - mean) ** 2 * joint).sum() / joint.sum(), rel=0.15)


def test_what_the_pairs_say_is_learnt():
    """The log-odds of the noise model are three times too large and a half too high; the other features are noise."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 2, 20_000)
    features = np.stack([3 * truth + 1.5, *rng.normal(size=(3, 20_000))], 1)
    is_right = rng.random(20_000) < expit(truth)
    chosen = rng.permutation(20_000)[:500]
    regression = pairs.fit(features, features[chosen], is_right[chosen], np.ones(500))
    assert np.abs(expit(regression.log_odds(features)) - expit(truth)).mean() < 0.04
    rates = regression.noise_rates(features, 20_000, 400, rng)
    assert np.quantile(rates, 0.025) < (~is_right).mean() < np.quantile(rates, 0.975)
    assert rates.std() < 0.025  # of 500 coins 0.022; the features tell them apart, so less


def test_few_pairs_leave_the_noise_model_as_it_is():
    rng = np.random.default_rng(1)
    odds = rng.normal(0, 3, 5_000)
    features = np.stack([odds, odds / 2, *rng.normal(size=(2, 5_000))], 1)
    is_right = rng.random(5_000) < expit(odds)
    regression = pairs.fit(features, features[:8], is_right[:8], np.ones(8))
    assert np.corrcoef(regression.log_odds(features), odds)[0, 1] > 0.98


def test_moments_of_many_features_are_taken_in_float64():
    """Sums of 2²⁴ and more numbers in float32 stand still; a stride of 0 stands for so many without their memory."""
    everywhere = np.lib.stride_tricks.as_strided(np.float32([3, 3, 3, 3]), (40_000_000, 4), (0, 4))
    checked = np.random.default_rng(0).normal(size=(20, 4))
    found = pairs.fit(everywhere, checked, np.arange(20) < 15, np.ones(20))
    np.testing.assert_allclose(found.shift, [0, 0, 3, 3])
