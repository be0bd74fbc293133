"""Sparse over-parameterisation: the limit of zero vectors, a step of u and v by differences, wrong labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import CLASSES, make, make_batch

from ieg_jax.methods import sop
from ieg_jax.methods.parts import losses


def test_with_zero_vectors_it_is_the_cross_entropy():
    context, method, state, _ = make("sop")
    batch = make_batch()
    _, aux = method.loss(state.params, state, batch, method.supervise(state, batch, None), None)
    plain = losses.cross_entropy(aux.logits, context.one_hot(batch["label"])).mean()
    assert float(aux.terms["cross_entropy"]) == pytest.approx(float(plain), rel=1e-5)


def test_by_hand():
    """p = (0.2, 0.8), y = 0, u² = 0.5, v² = 0.3: q ∝ (0.7, 0.5)."""
    logits, label = jnp.log(jnp.array([[0.2, 0.8]])), jnp.array([[1.0, 0.0]])
    u, v = jnp.sqrt(jnp.array([[0.5]])), jnp.sqrt(jnp.array([[9.0, 0.3]]))
    np.testing.assert_allclose(sop.offset(u, v, label), [[0.5, -0.3]], rtol=1e-6)
    assert float(sop.cross_entropy(logits, label, u, v)[0]) == pytest.approx(-np.log(0.7 / 1.2), rel=1e-6)
    wide = sop.offset(jnp.array([[3.0]]), jnp.array([[0.0, 3.0]]), label)
    np.testing.assert_allclose(wide, [[1, -1]], err_msg="cut to 1")


def test_a_step_of_the_vectors_is_that_of_differences():
    _, method, state, _ = make("sop", **{"method.u_rate": 2.0, "method.v_rate": 3.0})
    batch, rng = make_batch(), np.random.default_rng(0)
    rows = batch["row"]
    u, v = 0.3 + 0.1 * rng.random((50, 1)), 0.3 + 0.1 * rng.random((50, CLASSES))
    state = state.replace(
        method={"u": jnp.zeros((1024, 1)).at[:50].set(u), "v": jnp.zeros((1024, CLASSES)).at[:50].set(v)}
    )
    supervision = method.supervise(state, batch, None)
    _, aux = method.loss(state.params, state, batch, supervision, None)
    p, y = np.asarray(jax.nn.softmax(aux.logits), np.float64), np.eye(CLASSES)[batch["label"]]
    guess = np.eye(CLASSES)[p.argmax(-1)]

    def value(u, v, v_of_ce):
        s = u**2 * y - v_of_ce**2 * (1 - y)
        q = np.maximum(p + s, 1e-4)
        q = q / q.sum(-1, keepdims=True)
        error = ((guess + u**2 * y - v**2 * (1 - y) - y) ** 2).sum()
        return -(y * np.log(q)).sum() + error

    small = 1e-6
    for number in (0, 5):
        step = np.zeros((16, 1))
        step[number] = small
        slope = (value(u[rows] + step, v[rows], v[rows]) - value(u[rows] - step, v[rows], v[rows])) / (2 * small)
        moved = supervision.memory["u"][rows[number], 0] - u[rows[number], 0]
        assert float(moved) == pytest.approx(-2.0 * slope / 16, rel=1e-3, abs=1e-6)
        for c in range(CLASSES):
            step = np.zeros((16, CLASSES))
            step[number, c] = small
            slope = (value(u[rows], v[rows] + step, v[rows]) - value(u[rows], v[rows] - step, v[rows])) / (2 * small)
            moved = supervision.memory["v"][rows[number], c] - v[rows[number], c]
            assert float(moved) == pytest.approx(-3.0 * slope / 16, rel=1e-3, abs=1e-6)


def test_a_label_that_the_network_denies_is_taken_back():
    """Of two examples of one image with other labels the vectors of the wrong one grow."""
    logits, label = jnp.array([[6.0, 0.0, 0.0], [6.0, 0.0, 0.0]]), jnp.eye(3)[jnp.array([0, 1])]
    u, v = jnp.full((2, 1), 0.1), jnp.full((2, 3), 0.1)
    by_u = jax.grad(lambda u: sop.cross_entropy(logits, label, u, v).sum())(u)
    assert by_u[1, 0] < 0 and abs(by_u[0, 0]) < abs(by_u[1, 0]) / 100
