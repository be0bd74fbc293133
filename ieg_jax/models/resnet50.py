"""ResNet-50 for photographs (He et al. 2015), version 1.5, in which the 3×3 convolution of a block has the stride.

The paper's WebVision experiments use this network. Padding is symmetric, as in PyTorch. The three conventions
(`ResNet50.conventions`) are those under which published weights were trained: with the right one such weights give the
same logits here, and `pretrained.py` reads them. The last batch norm of a block starts with the scale 1 like the
others; Goyal et al. (2017) start it at 0, which helps with batches of thousands of images.
"""

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network, check_colours, of_imagenet, scaled_channels
from ieg_jax.models.naming import TORCH_LEAVES, Naming

READS = ("width", "conventions")
CONVENTIONS = ("own", "torch", "flax")

BLOCKS = (3, 4, 6, 3)  # in each stage
EXPANSION = 4  # outer width of a block / its inner width


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds ResNet-50 with `model.width` times its channels, under `model.conventions`.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a width that leaves no channel.
    """
    return ResNet50(features=scaled_channels(model, 64), conventions=model.conventions, **common)


class ResNet50(Network):
    """ResNet-50 has 25,557,032 parameters for 1000 classes. It halves the usual 224×224 pixels five times, rounding up.

    Attributes, besides those of `Network`:
      features: the channels of the first convolution and the inner width of the first stage; it doubles in each stage.
      conventions: what the network does with images in [-1, 1], and how it pads:
        own: it takes the images as they are;
        torch: it first subtracts ImageNet's mean from red, green and blue and divides by ImageNet's standard deviation,
          as torchvision's weights need it;
        flax: it does the same, and layers with a stride have SAME padding, which for an even size is at the end alone,
          as the weights of Flax's ImageNet example need it.
    """

    features: int = 64
    conventions: str = "own"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        Raises:
          UserError: for images without three colours, under other conventions than `own`.
        """
        padding = "SAME" if self.conventions == "flax" else 1
        check_colours(x, self.conventions)
        if self.conventions != "own":
            x = of_imagenet(x)
        x = self.conv(self.features, (7, 7), 2, padding=3, name="init_conv")(x)
        x = nn.relu(self.norm("init_norm")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME" if padding == "SAME" else ((1, 1), (1, 1)))
        for stage, blocks in enumerate(BLOCKS, start=1):
            for number in range(blocks):
                make = functools.partial(
                    Bottleneck,
                    features=self.features * 2 ** (stage - 1),
                    stride=2 if stage > 1 and number == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    padding=padding,
                    name=f"stage{stage}_block{number}",
                )
                x = self.run_block(lambda x, make=make: make()(x, train), x)
        return self.logits(x.mean((1, 2)))


class Bottleneck(nn.Module):
    """relu(shortcut(x) + norm(conv1×1(relu(norm(conv3×3(relu(norm(conv1×1(x))))))))).

    The shortcut is x itself, or norm(conv1×1(x)) where the shape changes.

    Attributes:
      features: the inner width; the outer width is EXPANSION times as much.
      stride: of the 3×3 convolution and of the shortcut.
      conv: makes a convolution without biases, as `Network.conv` does.
      norm: makes a batch norm, as `Network.norm` does.
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


# ---- The names of its arrays in published files.


def _published(modules: dict[str, str], torch: bool) -> Callable[[str], str]:
    """The function `Naming.name` of a published ResNet-50.

    Args:
      modules: kind of layer -> the name of its module in the file. A name may contain `{stage}` and
        `{layer}`, which count from 1, and `{stage0}`, `{layer0}`, `{block}` (in its stage) and `{number}` (of the block
        in the network), which count from 0.
      torch: whether the names end as PyTorch's do, in `.weight`, and do not begin with the collection.
    """

    def name(path: str) -> str:
        pattern = r"(params|batch_stats)/(?:stage(\d)_block(\d)/)?(head|(?:init_|shortcut_)?(?:conv|norm))(\d?)/(\w+)"
        collection, stage, block, kind, layer, leaf = re.fullmatch(pattern, path).groups()
        stage, block, layer = int(stage or 1), int(block or 0), int(layer or 1)
        number = sum(BLOCKS[: stage - 1]) + block
        module = modules[kind].format(
            stage=stage, stage0=stage - 1, layer=layer, layer0=layer - 1, block=block, number=number
        )
        return f"{module}.{TORCH_LEAVES[leaf]}" if torch else f"{collection}/{module}/{leaf}"

    return name


_TORCHVISION = {
    "init_conv": "conv1",
    "init_norm": "bn1",
    "conv": "layer{stage}.{block}.conv{layer}",
    "norm": "layer{stage}.{block}.bn{layer}",
    "shortcut_conv": "layer{stage}.{block}.downsample.0",
    "shortcut_norm": "layer{stage}.{block}.downsample.1",
    "head": "fc",
}
_TRANSFORMERS = {
    "init_conv": "resnet.embedder.embedder.convolution",
    "init_norm": "resnet.embedder.embedder.normalization",
    "conv": "resnet.encoder.stages.{stage0}.layers.{block}.layer.{layer0}.convolution",
    "norm": "resnet.encoder.stages.{stage0}.layers.{block}.layer.{layer0}.normalization",
    "shortcut_conv": "resnet.encoder.stages.{stage0}.layers.{block}.shortcut.convolution",
    "shortcut_norm": "resnet.encoder.stages.{stage0}.layers.{block}.shortcut.normalization",
    "head": "classifier.1",
}
_FLAX_EXAMPLE = {
    "init_conv": "conv_init",
    "init_norm": "bn_init",
    "conv": "BottleneckResNetBlock_{number}/Conv_{layer0}",
    "norm": "BottleneckResNetBlock_{number}/BatchNorm_{layer0}",
    "shortcut_conv": "BottleneckResNetBlock_{number}/conv_proj",
    "shortcut_norm": "BottleneckResNetBlock_{number}/norm_proj",
    "head": "Dense_0",
}
NAMINGS = (
    Naming("torchvision's names", _published(_TORCHVISION, torch=True), ("torch",), torch=True),
    Naming("transformers' names", _published(_TRANSFORMERS, torch=True), ("torch",), torch=True),
    Naming("the names of Flax's ImageNet example", _published(_FLAX_EXAMPLE, torch=False), ("flax",)),
)
