"""The meta-gradient against a closed form, and against finite differences."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import x64

from ieg_jax.methods.parts import lookahead, losses, optimizers
from ieg_jax.models.tiny import Tiny


def test_closed_form_on_a_linear_model():
    """ℓ_i = ½(x_i·θ − y_i)², probe loss ½(x_p·θ − y_p)²: ∂L_p/∂ω_i = −α (x_p·θ′ − y_p) (x_i·θ − y_i) x_p·x_i."""
    with x64():
        x = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
        y = jnp.array([1.0, 0.0, -2.0])
        probe_x, probe_y = jnp.array([0.5, -1.0]), 0.25
        theta, momentum = {"w": jnp.array([0.3, -0.7])}, {"w": jnp.array([0.1, 0.2])}
        weights, rate, decay = jnp.array([0.2, 0.3, 0.5]), 0.1, 0.9

        loss, gradient = lookahead.meta_gradient(
            lambda p, w: jnp.sum(w * 0.5 * (x @ p["w"] - y) ** 2),
            lambda p: 0.5 * (probe_x @ p["w"] - probe_y) ** 2,
            weights,
            theta,
            optax.TraceState(momentum),
            optax.trace(decay),
            rate,
        )

        residual = np.array([1 * 0.3 + 2 * -0.7 - 1, -1 * 0.3 + 0.5 * -0.7, 3 * -0.7 + 2])
        step = decay * np.array([0.1, 0.2]) + np.array([0.2, 0.3, 0.5]) * residual @ np.asarray(x)
        after = np.array([0.3, -0.7]) - rate * step
        probe_residual = np.array([0.5, -1.0]) @ after - 0.25
        expected = -rate * probe_residual * residual * (np.asarray(x) @ np.array([0.5, -1.0]))
        np.testing.assert_allclose(loss, 0.5 * probe_residual**2, rtol=1e-12)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@functools.cache
def network_case(optimizer_name, nesterov):
    """The losses of a step on a network with batch norm, in float64, with momentum from earlier steps."""
    size, classes = 6, 3
    network = Tiny(classes, features=3, dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    image, probe_image = (jnp.asarray(rng.normal(size=(size, 4, 4, 1))) for _ in range(2))
    label, probe_label = (jax.nn.one_hot(rng.integers(0, classes, size), classes) for _ in range(2))
    soft = jax.nn.softmax(jnp.asarray(rng.normal(size=(size, classes))))
    # Smooth, so that no kink lies between the two points of a difference.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "relu", nn.softplus)
        variables = network.init(jax.random.key(1), image, train=True)

    def forward(params, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn, "relu", nn.softplus)
            return network.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]

    def noisy_loss(params, v):
        weights, trust = v
        target = trust[:, None] * label + (1 - trust[:, None]) * soft
        decay = losses.weight_decay(params, 5e-4, "all")
        return jnp.sum(weights * losses.cross_entropy(forward(params, image), target)) + decay

    def probe_loss(params):
        return jnp.mean(losses.cross_entropy(forward(params, probe_image), probe_label))

    params = variables["params"]
    optimizer = optax.scale_by_adam(eps_root=1e-12) if optimizer_name == "adam" else optax.trace(0.9, nesterov=nesterov)
    state = optimizer.init(params)
    initial = (jnp.full(size, 1 / size), jnp.full(size, 0.9))
    for _ in range(2):
        grads = jax.grad(noisy_loss)(params, initial)
        params, state, _ = optimizers.apply(optimizer, grads, state, params, 0.1)
    return noisy_loss, probe_loss, initial, params, state, optimizer


@pytest.mark.parametrize("optimizer_name, nesterov", [("sgd", False), ("sgd", True), ("adam", False)])
def test_finite_differences(optimizer_name, nesterov):
    with x64():
        noisy_loss, probe_loss, initial, params, state, optimizer = network_case(optimizer_name, nesterov)
        rate = 0.1 if optimizer_name == "sgd" else 0.01

        @jax.jit
        def after(v):
            return probe_loss(lookahead.lookahead(lambda p: noisy_loss(p, v), params, state, optimizer, rate))

        _, gradient = jax.jit(
            lambda v: lookahead.meta_gradient(noisy_loss, probe_loss, v, params, state, optimizer, rate)
        )(initial)
        for part in range(2):
            differences = []
            for i in range(len(initial[part])):
                # The fourth-order central difference: its error is far below the rounding error of the second.
                h = 1e-3

                def shifted(amount, part=part, i=i):
                    v = list(initial)
                    v[part] = v[part].at[i].add(amount)
                    return float(after(tuple(v)))

                differences.append((8 * (shifted(h) - shifted(-h)) - (shifted(2 * h) - shifted(-2 * h))) / (12 * h))
            error = np.abs(np.asarray(gradient[part]) - differences).max() / np.abs(differences).max()
            assert error < 1e-5, (part, error)
            assert np.abs(differences).max() > 1e-6, "a gradient of nothing proves nothing"


def test_layers_that_do_not_match_stay():
    with x64():
        noisy_loss, _, initial, params, state, optimizer = network_case("sgd", False)
        after = lookahead.lookahead(lambda p: noisy_loss(p, initial), params, state, optimizer, 0.1, layers="^head/")
        everywhere = lookahead.lookahead(lambda p: noisy_loss(p, initial), params, state, optimizer, 0.1)
    np.testing.assert_array_equal(after["conv0"]["kernel"], params["conv0"]["kernel"])
    np.testing.assert_array_equal(after["head"]["kernel"], everywhere["head"]["kernel"])
    assert np.abs(after["head"]["kernel"] - params["head"]["kernel"]).max() > 0


def test_example_weights_and_label_trust():
    gradient = jnp.array([-3.0, 1.0, -1.0, 0.0])
    np.testing.assert_allclose(lookahead.example_weights(gradient), np.array([3, 0, 1, 0]) / 4.00001, rtol=1e-6)
    np.testing.assert_array_equal(lookahead.example_weights(jnp.array([1.0, 2.0])), [0, 0])
    np.testing.assert_array_equal(lookahead.label_trust(gradient), [1, 0, 1, 0])
