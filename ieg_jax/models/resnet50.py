"""ResNet-50 for photographs (He et al. 2015), version 1.5: the stride is in the 3×3 convolution of a block.

The network of the paper's WebVision experiments. Padding is symmetric, as in PyTorch; with the conventions of those who
publish weights (`ResNet50.conventions`) these compute the same here, and `pretrained.py` reads them. The last scale of
a block starts at 1 like the others (starting it at 0, as Goyal et al. 2017 do, is for batches of thousands).
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
IMAGENET_MEAN = (
    0.485,
    0.456,
    0.406,
)  # of red, green and blue in [0, 1], as torchvision, timm and Flax's example use them
IMAGENET_STD = (0.229, 0.224, 0.225)


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds ResNet-50 with `model.width` times its channels; `depth` and `variant` are not used.

    Raises:
      UserError: for a width that leaves no channel.
    """
    if round(64 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves resnet50 without a channel")
    return ResNet50(features=round(64 * model.width), conventions=model.conventions, **common)


class ResNet50(nn.Module):
    """25,557,032 parameters for 1000 classes. Made for 224×224 pixels; sizes are halved five times, rounding up.

    Attributes:
      num_classes: K.
      features: channels of the first convolution and inner width of the first stage; it doubles in each stage.
      conventions: own: images are taken as they are, in [-1, 1]. torch: first red, green and blue are taken less
        ImageNet's mean, by its deviation, as for torchvision's weights. flax: as torch, but where there is a stride
        padding is SAME, which for an even size is at the end alone; so are weights of Flax's ImageNet example trained.
      batch_groups: groups of batch norm.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: see `layers.run_block`.
    """

    num_classes: int
    features: int = 64
    conventions: str = "own"
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        Raises:
          UserError: for images that do not have the three colours that the conventions speak of.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, groups=self.batch_groups, **dtypes)
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he_normal_fan_out, **dtypes)

        padding = "SAME" if self.conventions == "flax" else 1
        if self.conventions != "own":
            if x.shape[-1] != 3:
                raise UserError(
                    f"model.conventions: got {self.conventions!r}, for red, green and blue, expected 'own' for images "
                    f"with {x.shape[-1]} channel(s)"
                )
            # Here and not as part of the first kernel: around the image are zeros after it, the mean colour before it.
            mean, std = (jnp.asarray(values, x.dtype) for values in (IMAGENET_MEAN, IMAGENET_STD))
            x = (x - (2 * mean - 1)) / (2 * std)
        x = conv(self.features, (7, 7), 2, padding=3, name="init_conv")(x)
        x = nn.relu(norm(name="init_norm")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME" if padding == "SAME" else ((1, 1), (1, 1)))
        for stage, blocks in enumerate(BLOCKS, start=1):
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                make = functools.partial(Bottleneck, self.features * 2 ** (stage - 1), stride, conv, norm, padding)
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
      padding: of the 3×3 convolution, as `nn.Conv` takes it.
    """

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    padding: int | str = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, EXPANSION · features]`."""
        outer = EXPANSION * self.features
        y = nn.relu(self.norm(name="norm1")(self.conv(self.features, (1, 1), name="conv1")(x), train))
        y = self.conv(self.features, (3, 3), self.stride, padding=self.padding, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.norm(name="norm3")(self.conv(outer, (1, 1), name="conv3")(y), train)
        if x.shape[-1] != outer or self.stride != 1:
            x = self.conv(outer, (1, 1), self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)
