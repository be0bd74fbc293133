"""Layers against others that compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ieg_jax.models.layers import DepthwiseConv


@pytest.mark.parametrize(
    "side, stride, padding", [(3, 1, "SAME"), (3, 2, "SAME"), (5, 2, "SAME"), (5, 2, 2), (3, 1, 1)]
)
@pytest.mark.parametrize("shape", [(2, 7, 8, 6), pytest.param((1, 4, 4, 1), marks=pytest.mark.slow)])
def test_depthwise_convolution_is_that_of_flax(side, stride, padding, shape):
    """Values, and gradients of the first and the second order."""
    x = jax.random.normal(jax.random.key(1), shape)
    ours = DepthwiseConv((side, side), stride, padding)
    flax = nn.Conv(shape[-1], (side, side), stride, padding, feature_group_count=shape[-1], use_bias=False)
    variables = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, flax.init(jax.random.key(0), x))

    def cubed(layer):
        return lambda v, x: jnp.sum(layer.apply(v, x) ** 3)

    def second(layer):
        return lambda v, x: jnp.sum(jax.grad(cubed(layer), 1)(v, x) ** 2)

    for of in (lambda layer: layer.apply, lambda layer: jax.grad(cubed(layer)), lambda layer: jax.grad(second(layer))):
        got, expected = (jax.tree.leaves(jax.jit(of(layer))(variables, x))[0] for layer in (ours, flax))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
