"""The beta mixture against the posterior of the distributions that the losses were drawn from."""

import numpy as np
import pytest
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from ieg_jax.methods.parts.mixtures import EDGE, beta_mixture, normalised


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_posterior_of_a_known_mixture(share):
    rng = np.random.default_rng(0)
    wrong = rng.random(20_000) < share
    small, large = beta(2, 8), beta(7, 3)
    losses = np.where(wrong, large.rvs(20_000, random_state=1), small.rvs(20_000, random_state=2))
    found = beta_mixture(np.clip(losses, EDGE, 1 - EDGE))
    weights = share * large.pdf(losses), (1 - share) * small.pdf(losses)
    truth = weights[0] / sum(weights)
    assert np.abs(found - truth).mean() < 0.03
    assert found.mean() == pytest.approx(share, abs=0.03)
    assert roc_auc_score(wrong, found) > roc_auc_score(wrong, truth) - 1e-3
    order = np.argsort(losses)
    assert (np.diff(found[order]) > -1e-9).mean() > 0.99, "larger losses are not less suspicious"


def test_losses_are_brought_to_the_unit_interval():
    losses = np.concatenate([np.linspace(1, 3, 100), [1000.0]])
    found = normalised(losses)
    assert found.min() == EDGE and found.max() == 1 - EDGE
    inside = (losses > 1.2) & (losses < 2.8)
    slopes = np.diff(found[inside]) / np.diff(losses[inside])
    np.testing.assert_allclose(slopes, slopes[0])
    assert np.isfinite(normalised(np.ones(5))).all()
