"""Early-learning regularisation: targets and loss by hand, and what is remembered of whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, loss_of_logits, make, make_batch

from ieg_jax.methods import elr
from ieg_jax.methods.base import Supervision

BETA, STRENGTH = 0.6, 2.5
KEYS = {"method.target_momentum": BETA, "method.early_learning_weight": STRENGTH, "optimizer.weight_decay": 0.0}


def probabilities(context, state, batch):
    logits, _ = context.forward(state.params, state.batch_stats, batch["image"])
    return np.clip(np.asarray(jax.nn.softmax(logits), np.float64), 1e-4, 1 - 1e-4)


def test_two_steps_by_hand():
    context, method, state, step = make("elr", **KEYS)
    target = np.zeros((50, CLASSES))
    for seed in range(2):
        batch = make_batch(seed=seed)
        rows, labels = batch["row"], batch["label"]
        p = probabilities(context, state, batch)
        target[rows] = BETA * target[rows] + (1 - BETA) * p / p.sum(-1, keepdims=True)
        supervision = method.supervise(state, batch, None)
        np.testing.assert_allclose(supervision.prepared, target[rows], rtol=1e-5)
        value, aux = method.loss(state.params, state, batch, supervision, None)
        cross_entropy = -np.log(np.asarray(jax.nn.softmax(aux.logits)))[np.arange(16), labels].mean()
        regularisation = STRENGTH * np.log(1 - (p * target[rows]).sum(-1)).mean()
        assert float(value) == pytest.approx(cross_entropy + regularisation, rel=1e-5)
        state, _ = jax.jit(step)(state, batch, jax.random.key(0))
        np.testing.assert_allclose(state.method["target"], target, rtol=1e-4, atol=1e-7)
    assert (np.asarray(state.method["target"]).sum(-1) > 0).sum() == 16, "nobody else's target has moved"


def test_no_gradient_flows_into_the_targets():
    """The gradient is that of the loss with the targets as constants."""
    _, method, state, _ = make("elr", **KEYS)
    batch = make_batch()
    supervision = method.supervise(state, batch, None)
    constant = jax.tree.map(jnp.array, supervision)

    def value(params):
        return method.loss(params, state, batch, constant, None)[0]

    step = make("elr", **KEYS, **{"optimizer.momentum": 0.0})[3]
    after, _ = step(state, batch, jax.random.key(0))
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, jax.grad(value)(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), after.params, expected)


def test_it_pulls_towards_what_was_predicted_before():
    """Where target and prediction agree on another class than the label, the regularisation turns the gradient."""
    logits, labels = jnp.array([[0.0, 0.0, 4.0, 0.0]]), jnp.array([0])
    supervision = Supervision(prepared=jnp.array([[0.01, 0.01, 0.95, 0.03]]))

    def gradient(weight):
        keys = {"method.early_learning_weight": weight}
        return jax.grad(lambda x: loss_of_logits(elr, x, labels, supervision, **keys))(logits)[0, 2]

    assert gradient(0.0) > 0 > gradient(3.0)
