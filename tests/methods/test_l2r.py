"""L2R on a linear network, in closed form."""

import numpy as np
import pytest
from conftest import x64
from linear import CLASSES, cross_entropy, make, make_batch, pixels, softmax

RATE, DECAY = 0.1, 0.05


@pytest.mark.parametrize("name, keys", [("as usual", {}), ("without decay", {"meta.weight_decay": False})])
def test_weights_and_loss_by_hand(name, keys):
    """At ω = 0 the lookahead takes a step on the weight decay alone, Θ′ = (1 − α d) Θ, whatever the momentum m is.

    So ∂L_p/∂ω_i = −α ⟨∇L_p(Θ′), ∇ℓ_i(Θ)⟩, where ∇ℓ of logits x Θ is xᵀ (softmax − y).
    """
    batch = make_batch()
    with x64():
        _, method, state, weights, momentum = make("l2r", **{"optimizer.weight_decay": DECAY} | keys)
        supervision = method.supervise(state, batch, None)
        value, aux = method.loss(state.params, state, batch, supervision, None)
    assert np.abs(momentum).min() > 0.01, "which would move Θ′ if it were used"
    label, probe_label = (np.eye(CLASSES)[batch[name]] for name in ("label", "probe_label"))
    x, probe = pixels(batch["image"]), pixels(batch["probe_image"])
    after = (1 - RATE * DECAY) * weights
    of_probes = probe.T @ (softmax(probe @ after) - probe_label) / len(probe) + (not keys) * DECAY * after
    products = np.einsum("ij,ik,jk->i", x, softmax(x @ weights) - label, of_probes)
    expected = np.maximum(RATE * products, 0)
    expected /= expected.sum() + 1e-5
    assert 0 < (expected > 0).sum() < len(expected)
    np.testing.assert_allclose(supervision.example_weights, expected, rtol=1e-9)
    trusted = cross_entropy(probe_label, probe @ after).mean() + (not keys) * 0.5 * DECAY * (after**2).sum()
    assert float(supervision.observed["loss/trusted_after_lookahead"]) == pytest.approx(trusted, rel=1e-9)
    weighted = (expected * cross_entropy(label, x @ weights)).sum()
    assert float(aux.terms["weighted"]) == pytest.approx(weighted, rel=1e-9)
    assert float(value) == pytest.approx(weighted + 0.5 * DECAY * (weights**2).sum(), rel=1e-9)
