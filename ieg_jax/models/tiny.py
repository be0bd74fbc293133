"""A network of two convolutions, for tests and for trying a pipeline out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models.layers import BatchNorm, DType, run_block


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network with 8 · `model.width` channels; `depth` and `variant` are not used."""
    return Tiny(features=max(1, round(8 * model.width)), **common)


class Tiny(nn.Module):
    """Two 3×3 convolutions with batch norm, the second with stride 2, and a dense layer."""

    num_classes: int
    features: int = 8
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for layer, stride in enumerate((1, 2)):

            def block(_, x, layer=layer, stride=stride):
                x = nn.Conv(self.features, (3, 3), stride, use_bias=False, name=f"conv{layer}", **dtypes)(x)
                return nn.relu(BatchNorm(self.batch_groups, name=f"norm{layer}", **dtypes)(x, train))

            x = run_block(self, block, x)
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x.mean((1, 2)))
