"""DenseNet-100 for small images (Huang et al. 2017), with bottlenecks and compression: DenseNet-BC, growth 12.

The network of the experiments with semantic noise of RoG (Lee et al. 2019), whose code builds this form and not the
plain one of 7.0 M parameters. Three blocks of 16 layers; each layer sees what all layers before it in its block gave.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm, DType, he_normal_fan_out, run_block

BOTTLENECK = 4  # channels between the two convolutions of a layer / growth


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds DenseNet-BC-100 with growth 12 · `model.width`; `depth` and `variant` are not used.

    Raises:
      UserError: for a width that leaves no channel.
    """
    if round(12 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves densenet100 without a channel")
    return DenseNet(growth=round(12 * model.width), **common)


class DenseNet(nn.Module):
    """769,162 parameters for 10 classes. Any image size: what is left after two halvings is averaged.

    Attributes:
      num_classes: K.
      depth: layers with weights, 6 n + 4 for n in each block.
      growth: channels that a layer adds.
      batch_groups: groups of batch norm.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: see `layers.run_block`; a block is one layer, so that only the channels that layers add are kept.
    """

    num_classes: int
    depth: int = 100
    growth: int = 12
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, groups=self.batch_groups, **dtypes)
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal_fan_out, **dtypes)

        def normalized(name, x):
            return nn.relu(norm(name=name)(x, train))

        x = conv(2 * self.growth, (3, 3), name="init_conv")(x)
        for block in (1, 2, 3):
            # Parts of the input of the next layer, put together inside it: with remat they are not kept twice.
            parts = (x,)
            for layer in range((self.depth - 4) // 6):

                def dense_layer(_, parts, name=f"block{block}_layer{layer}"):
                    y = normalized(f"{name}_norm1", jnp.concatenate(parts, -1))
                    y = conv(BOTTLENECK * self.growth, (1, 1), name=f"{name}_conv1")(y)
                    return conv(self.growth, (3, 3), name=f"{name}_conv2")(normalized(f"{name}_norm2", y))

                parts += (run_block(self, dense_layer, parts),)
            if block < 3:

                def transition(_, parts, name=f"transition{block}"):
                    x = normalized(f"{name}_norm", jnp.concatenate(parts, -1))
                    x = conv(x.shape[-1] // 2, (1, 1), name=f"{name}_conv")(x)
                    # An odd size is rounded up, so that small images do not vanish; what is padded does not count.
                    return nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)

                x = run_block(self, transition, parts)
        x = normalized("final_norm", jnp.concatenate(parts, -1)).mean((1, 2))
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x)
