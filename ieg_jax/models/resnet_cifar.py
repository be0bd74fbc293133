"""ResNet-18 and ResNet-34 for images of 32×32 pixels, and the pre-activated ResNet-18: the networks of the field.

Most papers on noisy labels since 2020 have one of these for CIFAR: ELR and CIFAR-10N ResNet-34, DivideMix, ELR+, SSR
and ProMix the pre-activated ResNet-18. They have the stages of ImageNet's networks (He et al. 2015, 2016), behind a 3×3
convolution without stride and without pooling. The pre-activated one is that of DivideMix's code, which the others took
over, and differs from the paper's (He et al. 2016) in three places: there is batch norm behind the first convolution,
none before the mean over the pixels, and the shortcut of every block starts behind its first batch norm and ReLU, also
where the shape stays.

Initial kernels are drawn by He et al. (2015); those papers have PyTorch's usual ones, of a sixth of their variance,
which batch norm undoes.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network, scaled_channels


class CifarResNet(Network):
    """ResNet-18 has 11,173,962 parameters for 10 classes, ResNet-34 21,282,122, the pre-activated ResNet-18 11,171,274.

    Attributes, besides those of `Network`:
      blocks: in each stage; a stage begins with a stride of 2, the first apart.
      preactivated: whether batch norm and ReLU are before the convolutions of a block, see above.
      features: the channels of the first stage; they double in each stage.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    preactivated: bool = False
    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        x = self.conv(self.features, (3, 3), name="init_conv")(x)
        x = nn.relu(self.norm("init_norm")(x, train))
        for stage, blocks in enumerate(self.blocks, start=1):
            for number in range(blocks):
                make = functools.partial(
                    PreactivatedBlock if self.preactivated else BasicBlock,
                    features=self.features * 2 ** (stage - 1),
                    stride=2 if stage > 1 and number == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    name=f"stage{stage}_block{number}",
                )
                x = self.run_block(lambda x, make=make: make()(x, train), x)
        return self.logits(x.mean((1, 2)))


class _Block(nn.Module):
    """What the two kinds of block share.

    Attributes:
      features: the channels.
      stride: of the first convolution and of the shortcut.
      conv: makes a convolution without biases, as `Network.conv` does.
      norm: makes a batch norm, as `Network.norm` does.
    """

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def changes(self, x: jax.Array) -> bool:
        """Whether the output has another shape than x."""
        return self.stride != 1 or x.shape[-1] != self.features


class BasicBlock(_Block):
    """relu(shortcut(x) + norm(conv3×3(relu(norm(conv3×3(x)))))).

    The shortcut is x itself, or norm(conv1×1(x)) where the shape changes.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, features]`."""
        y = self.conv(self.features, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train))
        y = self.norm(name="norm2")(self.conv(self.features, (3, 3), name="conv2")(y), train)
        if self.changes(x):
            x = self.conv(self.features, (1, 1), self.stride, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x, train)
        return nn.relu(x + y)


class PreactivatedBlock(_Block):
    """shortcut(a) + conv3×3(relu(norm(conv3×3(a)))) with a = relu(norm(x)).

    The shortcut is a itself, or conv1×1(a) where the shape changes.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[n, H, W, C]` -> `[n, ⌈H / stride⌉, ⌈W / stride⌉, features]`."""
        shortcut = activated = nn.relu(self.norm(name="norm1")(x, train))
        y = self.conv(self.features, (3, 3), self.stride, padding=1, name="conv1")(activated)
        y = nn.relu(self.norm(name="norm2")(y, train))
        y = self.conv(self.features, (3, 3), name="conv2")(y)
        if self.changes(x):
            shortcut = self.conv(self.features, (1, 1), self.stride, name="shortcut_conv")(activated)
        return shortcut + y


@dataclasses.dataclass(frozen=True)
class Size:
    """An entry of the registry: the attributes of `CifarResNet`."""

    blocks: tuple[int, ...]
    preactivated: bool = False

    READS = ("width",)

    def from_config(self, model: ConfigDict, **common) -> nn.Module:
        """Builds the network with `model.width` times its channels; `common` are the attributes of `Network`.

        Raises:
          UserError: for a width that leaves no channel.
        """
        return CifarResNet(features=scaled_channels(model, 64), **vars(self), **common)


SIZES = {
    "resnet18": Size((2, 2, 2, 2)),
    "resnet34": Size((3, 4, 6, 3)),
    "preact_resnet18": Size((2, 2, 2, 2), preactivated=True),
}
