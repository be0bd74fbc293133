"""The beta mixture against the posterior of the distributions that the losses were drawn from."""

import numpy as np
import pytest
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from ieg_jax.methods.parts.mixtures import EDGE, BetaMixture, fit_betas, large_losses


def rises(probability, losses):
    return (np.diff(probability[np.argsort(losses)]) >= -1e-9).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_posterior_of_a_known_mixture(share):
    rng = np.random.default_rng(0)
    wrong = rng.random(20_000) < share
    small, large = beta(2, 8), beta(7, 3)
    losses = np.where(wrong, large.rvs(20_000, random_state=1), small.rvs(20_000, random_state=2))
    clipped = np.clip(losses, EDGE, 1 - EDGE)
    mixture = fit_betas(clipped, steps=200)
    found = mixture.of_large(clipped)
    weights = share * large.pdf(losses), (1 - share) * small.pdf(losses)
    truth = weights[0] / sum(weights)
    assert np.abs(found - truth).mean() < 0.03
    assert found.mean() == pytest.approx(share, abs=0.03) == mixture.shares[1]
    np.testing.assert_allclose(mixture.means(), [0.2, 0.7], atol=0.03)
    assert roc_auc_score(wrong, found) > roc_auc_score(wrong, truth) - 1e-3
    assert rises(found, losses)


def test_posteriors_by_hand():
    """Densities 2 (1 − x) and 2 x at x = 1/4, with shares 2/3 and 1/3: 1 and 1/6, so 6/7 and 1/7."""
    mixture = BetaMixture(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([2 / 3, 1 / 3]))
    np.testing.assert_allclose(mixture.posteriors(np.array([0.25]))[:, 0], [6 / 7, 1 / 7])
    np.testing.assert_allclose(mixture.means(), [1 / 3, 2 / 3])


def test_a_wide_component_is_not_suspected_at_the_other_side():
    """A wide one of large losses around a narrow one of small: P falls from the left to it, and rises after it."""
    mixture = BetaMixture(np.array([[30.0, 70.0], [1.0, 1.0]]), np.full(2, 0.5))
    losses = np.linspace(0.01, 0.99, 99)
    raw, found = mixture.posteriors(losses)[1], mixture.of_large(losses)
    assert raw[0] > 0.9 and raw.argmin() in range(25, 35)
    np.testing.assert_allclose(found[: raw.argmin() + 1], raw.min())
    np.testing.assert_array_equal(found[40:], raw[40:].clip(EDGE, 1 - EDGE))


LOSSES = {  # of right labels, of wrong ones, share of these
    "normal": (lambda rng, n: rng.normal(1.6, 0.5, n), lambda rng, n: rng.normal(2.6, 0.4, n), 0.5),
    "gamma": (lambda rng, n: rng.gamma(1.0, 0.5, n), lambda rng, n: rng.gamma(6.0, 0.5, n), 0.5),
    "most": (lambda rng, n: rng.gamma(1.0, 0.5, n), lambda rng, n: rng.gamma(6.0, 0.5, n), 0.6),
    "far": (lambda rng, n: rng.gamma(1.0, 0.5, n), lambda rng, n: rng.normal(3.0, 0.8, n), 0.4),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_of_any_size(kind):
    """Ends that are heaped up, and many steps, let a component settle on one of the heaps."""
    rng = np.random.default_rng(0)
    right, wrong, share = LOSSES[kind]
    is_wrong = rng.random(20_000) < share
    losses = np.maximum(np.where(is_wrong, wrong(rng, 20_000), right(rng, 20_000)), 0)
    found = large_losses(losses)
    assert ((found > 0.5) == is_wrong).mean() > 0.82
    assert found[is_wrong].mean() - found[~is_wrong].mean() > 0.4
    assert rises(found, losses) and found.min() >= EDGE and found.max() <= 1 - EDGE


def test_outliers_have_no_part_in_the_fit():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.beta(2, 8, 1000), rng.beta(7, 3, 1000)])
    heaped = np.concatenate([losses, np.full(40, 50.0), np.full(40, -50.0)])
    np.testing.assert_allclose(large_losses(heaped)[: len(losses)], large_losses(losses), atol=0.1)
    assert np.isfinite(large_losses(np.ones(5))).all()
