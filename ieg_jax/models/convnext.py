"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808).

A convolutional network in the manner of a Transformer: patches of 4×4 pixels, four stages of blocks with a filter of
7×7 for each channel and a perceptron on each pixel, layer norm, and half as many pixels a side from stage to stage. In
V2 the perceptron normalises the responses of its channels, in place of layer scale. Nothing is dropped at random in
training.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import DepthwiseConv, DType, Network, check_colours, of_imagenet
from ieg_jax.models.naming import Naming, by_table, turned

STEM, KERNEL, EXPANSION = 4, 7, 4  # pixels of a patch, side of the filters, units of a perceptron / channels
SMALLEST = STEM * 2**3  # pixels of a side that leave one in the last stage
EPSILON = 1e-6  # of layer norm
LAYER_SCALE = 1e-6  # its initial value

normal = nn.initializers.truncated_normal(0.02)


class ConvNeXt(Network):
    """ConvNeXt-T, unless other sizes are set: 28,589,128 parameters for 1000 classes.

    Attributes, besides those of `Network`:
      blocks: in each stage.
      features: channels in each stage.
      second: whether it is V2.
      conventions: own: images in [-1, 1]; torch: less ImageNet's mean, by its deviation, as published weights need it.
    """

    blocks: tuple[int, ...] = (3, 3, 9, 3)
    features: tuple[int, ...] = (96, 192, 384, 768)
    second: bool = False
    conventions: str = "own"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        Sides are divided by 4, 2, 2 and 2, and what is left over is cut off.

        Raises:
          UserError: for images of less than 32 pixels a side, and for images without three colours under other
            conventions than `own`.
        """
        del train
        check_colours(x, self.conventions)
        if min(x.shape[1:3]) < SMALLEST:
            raise UserError(
                f"got images of {x.shape[1]}×{x.shape[2]} pixels, expected at least {SMALLEST} a side for ConvNeXt; "
                f"enlarge them, e.g. data.image_size={SMALLEST}"
            )
        if self.conventions != "own":
            x = of_imagenet(x)
        for stage, (blocks, features) in enumerate(zip(self.blocks, self.features, strict=True)):
            if stage:
                x = self._shrink(f"stage{stage}_conv", features, 2)(_norm(f"stage{stage}_norm", self.dtypes)(x))
            else:
                x = _norm("stem_norm", self.dtypes)(self._shrink("stem_conv", features, STEM)(x))
            for number in range(blocks):
                make = functools.partial(
                    Block, features=features, second=self.second, dtypes=self.dtypes,
                    convolutions=self.convolutions, name=f"stage{stage}_block{number}",
                )  # fmt: skip
                x = self.run_block(lambda x, make=make: make()(x), x)
        return self.logits(_norm("norm", self.dtypes)(x.mean((1, 2))))

    def _shrink(self, name: str, features: int, side: int) -> nn.Conv:
        return self.conv(features, (side, side), side, padding="VALID", use_bias=True, kernel_init=normal, name=name)


def _norm(name: str, dtypes: dict) -> nn.LayerNorm:
    # The fast variance, E[x²] - E[x]², loses digits.
    return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name=name, **dtypes)


class Block(nn.Module):
    """x + s · dense(gelu(dense(norm(depthwise7×7(x))))); in V2 with `GlobalResponseNorm` after gelu and without s.

    Attributes:
      features: the channels.
      second: whether it is of V2.
      dtypes: `dtype` and `param_dtype` of a layer.
      convolutions: see `Network`.
    """

    features: int
    second: bool
    dtypes: dict
    convolutions: str = "lax"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, features]` -> the same shape."""
        dense = functools.partial(nn.Dense, kernel_init=normal, **self.dtypes)
        sides = (KERNEL, KERNEL)
        depthwise = DepthwiseConv(
            sides, padding=KERNEL // 2, use_bias=True, convolutions=self.convolutions, name="depthwise", **self.dtypes
        )
        y = depthwise(x)
        y = dense(EXPANSION * self.features, name="dense1")(_norm("norm", self.dtypes)(y))
        y = nn.gelu(y, approximate=False)
        if self.second:
            y = GlobalResponseNorm(name="grn", **self.dtypes)(y)
        y = dense(self.features, name="dense2")(y)
        if not self.second:
            initial = nn.initializers.constant(LAYER_SCALE)
            y *= self.param("scale", initial, (self.features,), self.dtypes["param_dtype"]).astype(y.dtype)
        return x + y


class GlobalResponseNorm(nn.Module):
    """x + scale · x · g / mean(g) + bias, where g is the norm of each channel over the pixels of its image.

    At first scale and bias are 0. The norm is computed in float32 or better.

    Attributes:
      dtype: the type of the output.
      param_dtype: the type of scale and bias.
    """

    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[n, H, W, C]` -> the same shape; `scale` and `bias` are `[C]`."""
        scale, bias = (
            self.param(name, nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype(self.dtype)
            for name in ("scale", "bias")
        )
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # The root has no derivative at 0, where a channel answers nowhere.
        norm = jnp.sqrt(jnp.square(wide).sum((1, 2), keepdims=True) + 1e-12)
        share = (norm / (norm.mean(-1, keepdims=True) + EPSILON)).astype(self.dtype)
        return x + scale * x * share + bias


# ---- The names of its arrays in published files: {0} is the stage, {1} the block in it.

_TIMM = {
    "stem_conv": "stem.0", "stem_norm": "stem.1", "stage_norm": "stages.{0}.downsample.0",
    "stage_conv": "stages.{0}.downsample.1", "norm": "head.norm", "head": "head.fc",
    "stage_block/depthwise": "stages.{0}.blocks.{1}.conv_dw", "stage_block/norm": "stages.{0}.blocks.{1}.norm",
    "stage_block/dense1": "stages.{0}.blocks.{1}.mlp.fc1", "stage_block/grn": "stages.{0}.blocks.{1}.mlp.grn",
    "stage_block/dense2": "stages.{0}.blocks.{1}.mlp.fc2", "stage_block/scale": "stages.{0}.blocks.{1}.gamma",
}  # fmt: skip
_AUTHORS = {
    "stem_conv": "downsample_layers.0.0", "stem_norm": "downsample_layers.0.1",
    "stage_norm": "downsample_layers.{0}.0", "stage_conv": "downsample_layers.{0}.1", "norm": "norm", "head": "head",
    "stage_block/depthwise": "stages.{0}.{1}.dwconv", "stage_block/norm": "stages.{0}.{1}.norm",
    "stage_block/dense1": "stages.{0}.{1}.pwconv1", "stage_block/grn/scale": "stages.{0}.{1}.grn.gamma",
    "stage_block/grn/bias": "stages.{0}.{1}.grn.beta", "stage_block/dense2": "stages.{0}.{1}.pwconv2",
    "stage_block/scale": "stages.{0}.{1}.gamma",
}  # fmt: skip
_TRANSFORMERS = {
    "stem_conv": "embeddings.patch_embeddings", "stem_norm": "embeddings.layernorm",
    "stage_norm": "encoder.stages.{0}.downsampling_layer.0", "stage_conv": "encoder.stages.{0}.downsampling_layer.1",
    "norm": "layernorm", "stage_block/depthwise": "encoder.stages.{0}.layers.{1}.dwconv",
    "stage_block/norm": "encoder.stages.{0}.layers.{1}.layernorm",
    "stage_block/dense1": "encoder.stages.{0}.layers.{1}.pwconv1",
    "stage_block/grn": "encoder.stages.{0}.layers.{1}.grn",
    "stage_block/dense2": "encoder.stages.{0}.layers.{1}.pwconv2",
    "stage_block/scale": "encoder.stages.{0}.layers.{1}.layer_scale_parameter",
}  # fmt: skip


def _of_transformers(prefix: str) -> dict[str, str]:
    return {layer: f"{prefix}.{name}" for layer, name in _TRANSFORMERS.items()} | {"head": "classifier"}


def _made(path: str, arrays: list[np.ndarray]) -> np.ndarray:
    """The function `Naming.make`: dense layers may be convolutions of 1×1, and a norm of responses `[1, 1, 1, C]`."""
    array = arrays[0]
    if "/grn/" in path:
        return array.reshape(-1)
    if re.search(r"/(dense\d|head)/kernel$", path):
        array = array.reshape(array.shape[:2])
    return turned(array)


def _naming(title: str, table: dict[str, str]) -> Naming:
    return Naming(title, by_table(table), ("torch",), torch=True, make=_made)


@dataclasses.dataclass(frozen=True)
class Size:
    """An entry of the registry: ConvNeXt of one size."""

    blocks: tuple[int, ...]
    features: tuple[int, ...]
    second: bool = False

    READS = ("conventions",)
    CONVENTIONS = ("own", "torch")
    NAMINGS = (
        _naming("timm's names", _TIMM),
        _naming("the published names", _AUTHORS),
        _naming("transformers' names", _of_transformers("convnext")),
        _naming("transformers' names of V2", _of_transformers("convnextv2")),
    )

    def from_config(self, model: ConfigDict, **common) -> nn.Module:
        """Builds the network under `model.conventions`; `common` are the attributes of `Network`."""
        return ConvNeXt(conventions=model.conventions, **vars(self), **common)


SIZES = {
    "convnext_tiny": Size((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": Size((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": Size((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_nano": Size((2, 2, 8, 2), (80, 160, 320, 640), second=True),
    "convnextv2_tiny": Size((3, 3, 9, 3), (96, 192, 384, 768), second=True),
    "convnextv2_base": Size((3, 3, 27, 3), (128, 256, 512, 1024), second=True),
}
