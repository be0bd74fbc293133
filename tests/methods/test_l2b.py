"""Learning to bootstrap: L2R where there is no pseudo label, and weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import make, make_batch

from ieg_jax.methods.parts import losses


def gradients(name, batch, **keys):
    context, method, state, _ = make(name, **keys)
    return context, state, method.supervise(state, batch, None)


def helpful(batch):
    """Trusted examples of which the network is right: to be surer of its predictions helps them."""
    context, _, state, _ = make("l2b")
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    return batch | {"probe_image": batch["image"], "probe_label": np.asarray(jnp.argmax(logits, -1), np.int32)}


def test_the_weights_of_given_labels_are_those_of_l2r_but_for_their_sum():
    batch = helpful(make_batch())
    *_, ours = gradients("l2b", batch)
    *_, l2r = gradients("l2r", batch)
    share, of_pseudo = ours.example_weights.sum(), ours.prepared.sum()
    assert share > 0.05 and of_pseudo > 0.05
    np.testing.assert_allclose(ours.example_weights / share, l2r.example_weights, rtol=2e-3, atol=1e-5)
    assert float(share + of_pseudo) == pytest.approx(1, abs=1e-2), "one sum for both"


def test_where_the_pseudo_label_is_the_given_one_both_weights_are_alike():
    context, _, state, _ = (*make("l2b"),)
    batch = make_batch()
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    batch["label"] = np.asarray(jnp.argmax(logits, -1), np.int32)
    *_, ours = gradients("l2b", batch)
    np.testing.assert_allclose(ours.example_weights, ours.prepared, rtol=1e-6)
    *_, l2r = gradients("l2r", batch)
    np.testing.assert_allclose(2 * ours.prepared, l2r.example_weights, rtol=1e-3, atol=1e-5)


def test_the_weight_of_a_pseudo_label_is_its_gradient_along_that_of_the_trusted_loss():
    """As in L2R: max(0.1 ⟨∇L_p, ∇CE(ŷ_i)⟩, 0), here for ŷ."""
    batch = helpful(make_batch())
    context, state, ours = gradients("l2b", batch, **{"optimizer.weight_decay": 0.0})

    def trusted(params):
        logits, _ = context.forward(params, state.batch_stats, batch["probe_image"])
        return losses.cross_entropy(logits, context.one_hot(batch["probe_label"])).mean()

    def one(params, i):
        logits, _ = context.forward(params, state.batch_stats, batch["image"])
        return losses.cross_entropy(logits, ours.pseudo_label)[i]

    probe = jax.grad(trusted)(state.params)
    dot = jax.jit(lambda i: sum(map(jnp.vdot, *map(jax.tree.leaves, (probe, jax.grad(one)(state.params, i))))))
    positive = np.maximum([float(dot(i)) for i in range(16)], 0)
    found = np.asarray(ours.prepared)
    assert (positive > 0).sum() > 1, "some help the trusted set under the predicted class"
    np.testing.assert_allclose(found / found.sum(), positive / positive.sum(), rtol=5e-3, atol=1e-5)
