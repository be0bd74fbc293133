"""FSR: the weights of L2R as a limit, a step and its scores by hand, and the reward set."""

import types

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest
from conftest import x64
from linear import CLASSES, cross_entropy, pixels, softmax
from small_step import make, make_batch

from ieg_jax.errors import UserError
from ieg_jax.methods import fsr
from ieg_jax.methods.parts import lookahead

RATE, DECAY = 0.1, 0.05
NOW = {"method.reweight_epochs": 0.0}


def test_with_all_layers_and_trusted_images_it_is_l2r():
    batch = make_batch()
    batch |= {"reward_image": batch["probe_image"], "reward_label": batch["probe_label"]}
    context, _, state, _ = make("fsr", **{"method.lookahead_layers": ".*"})
    _, l2r, _, _ = make("l2r")
    start = context.optimizer.init(state.params)
    _, gradient, _ = jax.jit(
        lambda state, batch: fsr.reward_gradient(context, state, batch, jnp.zeros(16), start)
    )(state, batch)  # fmt: skip
    expected = jax.jit(l2r.supervise)(state, batch, None).example_weights
    assert 0 < (expected > 0).sum() < 16
    np.testing.assert_allclose(lookahead.example_weights(gradient), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["margin", "loss"])
def test_weights_and_scores_by_hand(by):
    """Θ′ = Θ − α (μ m + ∇(mean CE + ½ d ‖Θ‖²)); ∂L_r/∂ω_i = −α ⟨∇L_r(Θ′), ∇ℓ_i(Θ)⟩, with ∇ℓ = xᵀ (softmax − y)."""
    batch = linear.make_batch()
    batch |= {"reward_image": batch["probe_image"], "reward_label": batch["probe_label"]}
    with x64():
        keys = NOW | {"optimizer.weight_decay": DECAY, "method.reward_by": by, "meta.weight_decay_on": "loss"}
        _, method, state, weights, momentum = linear.make("fsr", **keys)
        supervision = method.supervise(state, batch, None)
        _, aux = method.loss(state.params, state, batch, supervision, None)
    label, reward_label = (np.eye(CLASSES)[batch[name]] for name in ("label", "probe_label"))
    x, reward = pixels(batch["image"]), pixels(batch["probe_image"])
    slope = x.T @ (softmax(x @ weights) - label) / len(x) + DECAY * weights
    after = weights - RATE * (0.9 * momentum + slope)
    of_reward = reward.T @ (softmax(reward @ after) - reward_label) / len(reward) + DECAY * after
    products = np.einsum("ij,ik,jk->i", x, softmax(x @ weights) - label, of_reward)
    expected = np.maximum(RATE * products, 0)
    expected /= expected.sum() + 1e-5
    assert 0 < (expected > 0).sum() < len(expected)
    np.testing.assert_allclose(supervision.example_weights, expected, rtol=1e-9)
    before = cross_entropy(label, x @ weights)
    score = before - cross_entropy(label, x @ after) if by == "margin" else -before
    found = np.asarray(supervision.memory["score"])
    np.testing.assert_allclose(found[batch["row"]], score, rtol=1e-5)
    assert np.isneginf(np.delete(found, batch["row"])).all(), "these were not seen yet"
    assert float(aux.terms["weighted"]) == pytest.approx((expected * before).sum(), rel=1e-9)


def test_only_the_head_moves():
    context, _, state, _ = make("fsr")
    _, _, after = jax.jit(
        lambda state, batch: fsr.reward_gradient(context, state, batch, jnp.full(16, 1 / 16), state.opt_state)
    )(state, make_batch())
    moved = {
        name
        for name in after
        for old, new in zip(*map(jax.tree.leaves, (state.params[name], after[name])), strict=True)
        if (old != new).any()
    }
    assert moved == {"head"}


def test_at_first_all_count_alike():
    _, method, state, _ = make("fsr", **{"method.reweight_epochs": 2.0, "batch_size": 16})
    batch = make_batch()
    for step, same in ((0, True), (6, True), (7, False)):  # 50 examples, 16 a step: two epochs are 6.25 steps
        weights = method.supervise(state.replace(step=jnp.int32(step)), batch, None).example_weights
        assert np.allclose(weights, 1 / 16) == same


def test_the_reward_set():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    score = np.array([1.0, 3.0, 2.0, -np.inf, 0.5, 0.6, 9.0, 7.0, 8.0, 6.0])
    assert fsr.best_of_each(score, labels, 1).tolist() == [1, 5, 6]
    assert fsr.best_of_each(score, labels, 100).tolist() == [1, 2, 5, 6, 8], "half of each class"
    _, method, state, _ = make("fsr", **{"method.reward_size": 3})
    look = types.SimpleNamespace(labels=labels, memory=lambda: {"score": score})
    same, rows = method.on_epoch(state, look)
    assert same is state and list(rows) == ["reward"] and rows["reward"].tolist() == [1, 5, 6]


def test_layers_that_are_not_there():
    _, method, state, _ = make("fsr", **{"method.lookahead_layers": "^haed/"})
    with pytest.raises(UserError, match=r"method.lookahead_layers='\^haed/' matches none of the"):
        method.supervise(state, make_batch(), None)
