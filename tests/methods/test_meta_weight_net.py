"""Meta-Weight-Net: the limit of a constant net, and a step of ψ by differences of the trusted loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import x64
from small_step import make, make_batch

from ieg_jax.methods import meta_weight_net
from ieg_jax.methods.parts import losses


def test_a_constant_net_is_the_cross_entropy():
    context, method, state, _ = make("meta_weight_net", **{"method.weight_rate": 1e-12})
    constant = jax.tree.map(jnp.zeros_like, state.method["psi"])
    constant["out"]["bias"] = jnp.array([0.7])
    state, batch = state.replace(method=state.method | {"psi": constant}), make_batch()
    supervision = method.supervise(state, batch, None)
    _, aux = method.loss(state.params, state, batch, supervision, None)
    plain = losses.cross_entropy(aux.logits, context.one_hot(batch["label"])).mean()
    assert float(aux.terms["weighted"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(supervision.observed["weight/mean"]) == pytest.approx(1 / (1 + np.exp(-0.7)), rel=1e-5)


def test_the_net_by_hand():
    psi = {
        "hidden": {"kernel": jnp.array([[2.0, -1.0]]), "bias": jnp.array([0.0, 1.0])},
        "out": {"kernel": jnp.array([[1.0], [3.0]]), "bias": jnp.array([-1.0])},
    }
    found = meta_weight_net.weigh(psi, jnp.array([0.5, 2.0]))
    outputs = np.array([1.0 + 3 * 0.5 - 1, 4.0 + 0 - 1])
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-outputs)), rtol=1e-6)


def test_a_step_of_the_net_is_that_of_differences():
    with x64():
        keys = {"method.weight_units": 3, "method.weight_rate": 0.01}
        context, method, state, _ = make("meta_weight_net", dtype=jnp.float64, **keys)
        widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.method["psi"])
        adam = optax.scale_by_adam().init(widened)
        state, batch = state.replace(method={"psi": widened, "adam": adam}), make_batch(np.float64)
        label = context.one_hot(batch["label"])

        def after(psi):
            def noisy(params):
                logits, _ = context.forward(params, state.batch_stats, batch["image"])
                ce = losses.cross_entropy(logits, label)
                weights = meta_weight_net.weigh(psi, jax.lax.stop_gradient(ce))
                return jnp.dot(weights, ce) / jnp.sum(weights) + context.weight_decay(params)

            slopes = jax.grad(noisy)(state.params)
            moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, slopes)  # without momentum yet
            logits, _ = context.forward(moved, state.batch_stats, batch["probe_image"])
            ce = losses.cross_entropy(logits, context.one_hot(batch["probe_label"]))
            return jnp.mean(ce) + context.meta_weight_decay(moved)

        value, small = jax.jit(after), 1e-5
        found = method.supervise(state, batch, None).memory["adam"].mu["out"]["kernel"]
        for unit in range(3):
            ends = []
            for sign in (1, -1):
                psi = jax.tree.map(jnp.array, widened)
                psi["out"]["kernel"] = psi["out"]["kernel"].at[unit, 0].add(sign * small)
                ends.append(float(value(psi)))
            slope = (ends[0] - ends[1]) / (2 * small)
            assert float(found[unit, 0]) == pytest.approx(0.1 * slope, rel=1e-4, abs=1e-9), (
                "0.1 of ∇: Adam's first moment"
            )
