"""ResNet29 version 2: the small pre-activation bottleneck network of the paper (He et al. 2016).

Three stages of three blocks with inner widths 16, 64, 128 and outer widths 64, 128, 256; no biases before batch
norm. `standard` is the network that the paper names. `authors` is the one its numbers come from: in every block
the first 1×1 convolution is preceded by batch norm *without* a ReLU. In both, the very first block has neither.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models.layers import BatchNorm, DType, run_block

STAGES = ((16, 64, 1), (64, 128, 2), (128, 256, 2))  # inner width, outer width, stride


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network; `model.depth` and `model.width` are not used, it has one size."""
    return ResNet29(authors=model.variant == "authors", **common)


class ResNet29(nn.Module):
    """840,730 parameters for 10 classes."""

    num_classes: int
    authors: bool = True
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, groups=self.batch_groups, **dtypes)
        init = nn.initializers.glorot_normal()
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=init, **dtypes)

        x = conv(16, (3, 3), name="init_conv")(x)
        x = nn.relu(norm(name="init_norm")(x, train))
        for stage, (inner, outer, stride) in enumerate(STAGES, start=1):
            for block in range(3):
                name = f"stage{stage}_block{block}"
                widths, strides = (inner, outer), (stride, stride) if block == 0 else (1, 1)

                def bottleneck(_, x, name=name, first=block == 0, widths=widths, strides=strides):
                    inner, outer = widths
                    y = x
                    if name != "stage1_block0":
                        y = norm(name=f"{name}_norm1")(y, train)
                        y = y if self.authors else nn.relu(y)
                    y = conv(inner, (1, 1), strides, name=f"{name}_conv1")(y)
                    y = nn.relu(norm(name=f"{name}_norm2")(y, train))
                    y = conv(inner, (3, 3), name=f"{name}_conv2")(y)
                    y = nn.relu(norm(name=f"{name}_norm3")(y, train))
                    y = conv(outer, (1, 1), name=f"{name}_conv3")(y)
                    if first:
                        x = conv(outer, (1, 1), strides, name=f"{name}_shortcut")(x)
                    return x + y

                x = run_block(self, bottleneck, x)
        x = nn.relu(norm(name="final_norm")(x, train)).mean((1, 2))
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(
            self.num_classes, kernel_init=init, dtype=head_dtype, param_dtype=self.param_dtype, name="head"
        )(x)
