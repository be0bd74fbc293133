"""ResNet-50 for photographs (He et al. 2015), version 1.5: the stride is in the 3×3 convolution of a block.

The network of the paper's WebVision experiments. Padding is symmetric, as in PyTorch, so that weights trained there
compute the same here. The last scale of a block starts at 1 like the others (starting it at 0, as Goyal et al. 2017
do, is for batches of thousands).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm, DType, he_normal_fan_out, run_block

BLOCKS = (3, 4, 6, 3)  # in each stage
EXPANSION = 4  # outer width of a block / its inner width


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds ResNet-50 with `model.width` times its channels; `depth` and `variant` are not used.

    Raises:
      UserError: for a width that leaves no channel.
    """
    if round(64 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves resnet50 without a channel")
    return ResNet50(features=round(64 * model.width), **common)


class ResNet50(nn.Module):
    """25,557,032 parameters for 1000 classes. Made for 224×224 pixels; sizes are halved five times, rounding up.

    Attributes:
      num_classes: K.
      features: channels of the first convolution and inner width of the first stage; it doubles in each stage.
      batch_groups: groups of batch norm.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: see `layers.run_block`.
    """

    num_classes: int
    features: int = 64
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

        x = conv(self.features, (7, 7), 2, padding=3, name="init_conv")(x)
        x = nn.relu(norm(name="init_norm")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(BLOCKS, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                make = functools.partial(Bottleneck, self.features * 2 ** (stage - 1), stride, conv, norm)
                name = f"stage{stage}_block{block}"
                x = run_block(self, lambda _, x, make=make, name=name: make(name=name)(x, train), x)
        x = x.mean((1, 2))
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x)


class Bottleneck(nn.Module):
    """relu(shortcut(x) + norm(conv1×1(relu(norm(conv3×3(relu(norm(conv1×1(x))))))))).

    The shortcut is x itself, or norm(conv1×1(x)) where the shape changes.

    Attributes:
      features: inner width; the outer width is EXPANSION times as much.
      stride: of the 3×3 convolution and of the shortcut.
      conv, norm: make the layers.
    """

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, EXPANSION · features]`."""
        outer = EXPANSION * self.features
        y = nn.relu(self.norm(name="norm1")(self.conv(self.features, (1, 1), name="conv1")(x), train))
        y = self.conv(self.features, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.norm(name="norm3")(self.conv(outer, (1, 1), name="conv3")(y), train)
        if x.shape[-1] != outer or self.stride != 1:
            x = self.conv(outer, (1, 1), self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)
