"""Layers that the networks share."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

DType = jnp.dtype | type


def run_block(module: nn.Module, function: Callable[[nn.Module, Any], jax.Array], x: Any) -> jax.Array:
    """`function(module, x)`, a block of the network `module`; with `module.remat` only x is kept for its gradient.

    Args:
      module: the network, with an attribute `remat`.
      function: makes layers, named by itself, and applies them.
      x: what goes into the block, an array or several.
    """
    return (nn.remat(function) if module.remat else function)(module, x)


class BatchNorm(nn.Module):
    """Batch normalisation over groups of the batch (Ioffe and Szegedy 2015).

    In training each of `groups` equal, contiguous parts of the batch is normalised with its own mean and
    (biased) variance; the moving averages take the mean over the groups of the mean and of the unbiased
    variance n/(n-1), as TensorFlow does. Statistics are computed in float32 or better.

    Attributes:
      groups: number of groups; must divide the batch.
      momentum: share of the old value that a moving average keeps.
      epsilon: added to the variance.
      dtype: of the output.
      param_dtype: of scale, bias and moving averages.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises `[n, ..., C]` over all axes but the last."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        moving_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), self.param_dtype)
        moving_var = self.variable("batch_stats", "var", jnp.ones, (channels,), self.param_dtype)
        shape, x = x.shape, x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # Statistics have the shape [groups, C] all along, without axes of size 1: with such axes XLA simplifies
        # the same forward pass differently with and without a gradient, and no longer shares the two.
        x = x.reshape(self.groups if train else 1, -1, *shape[1:])
        axes = tuple(range(1, x.ndim - 1))

        def spread(statistic):
            return jax.lax.broadcast_in_dim(statistic, x.shape, (0, x.ndim - 1))

        if train:
            mean = x.mean(axes)
            var = jnp.square(x - spread(mean)).mean(axes)
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                n = x[0].size // channels
                unbiased = var * (n / max(n - 1, 1))
                for moving, new in ((moving_mean, mean), (moving_var, unbiased)):
                    new = new.mean(0).astype(self.param_dtype)
                    moving.value = self.momentum * moving.value + (1 - self.momentum) * new
        else:
            mean, var = moving_mean.value[None], moving_var.value[None]
        y = (x - spread(mean)) * spread(jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(shape).astype(self.dtype)


def uniform_fan_out(key: jax.Array, shape: tuple[int, ...], dtype: DType = jnp.float32) -> jax.Array:
    """U(±1/√K) for a dense kernel `[n, K]`: the initial value of the authors' output layer."""
    limit = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2/(k²·out)) for a k×k convolution (He et al. 2015, counting outputs)."""
