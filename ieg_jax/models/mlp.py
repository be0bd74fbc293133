"""A head for ready-made features: dense layers with batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models.layers import BatchNorm, DType, run_block


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network with `model.depth` hidden layers of 256 · `model.width` units; `variant` is not used."""
    return MLP(depth=model.depth, features=max(1, round(256 * model.width)), **common)


class MLP(nn.Module):
    """Hidden layers (dense, batch norm, ReLU) and a dense layer; of an image all numbers in a row."""

    num_classes: int
    depth: int = 2
    features: int = 256
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Features `[n, 1, 1, D]` -> logits `[n, K]`, float32 or better."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.reshape(len(x), -1)
        for layer in range(self.depth):

            def block(_, x, layer=layer):
                x = nn.Dense(self.features, use_bias=False, name=f"dense{layer}", **dtypes)(x)
                return nn.relu(BatchNorm(self.batch_groups, name=f"norm{layer}", **dtypes)(x, train))

            x = run_block(self, block, x)
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x)
