"""ResNet29 version 2, the small network of the paper: pre-activation bottleneck blocks (He et al. 2016).

It has three stages of three blocks. The inner widths of the stages are 16, 64 and 128 channels, the outer ones 64, 128
and 256; convolutions before batch norm have no biases. There are two variants:

- `standard` is the network that the paper names;
- `authors` is the one that its numbers come from: in every block, the batch norm before the first 1×1 convolution is
  *not* followed by a ReLU; and the last layer begins with the uniform form of Glorot's distribution, not the normal.

In both, the very first block has neither batch norm nor ReLU before its first convolution.
"""

import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network

READS = ("variant",)

STAGES = ((16, 64, 1), (64, 128, 2), (128, 256, 2))  # inner width, outer width, stride


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network, which has one size, in the variant `model.variant`.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.
    """
    return ResNet29(authors=model.variant == "authors", **common)


class ResNet29(Network):
    """ResNet29 has 840,730 parameters for 10 classes, in both variants.

    Attributes, besides those of `Network`:
      authors: whether it is the variant `authors` or `standard`, see above.
    """

    authors: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        kernel_init = nn.initializers.glorot_normal()
        conv = functools.partial(self.conv, kernel_init=kernel_init)

        x = conv(16, (3, 3), name="init_conv")(x)
        x = nn.relu(self.norm("init_norm")(x, train))
        for stage, (inner, outer, stride) in enumerate(STAGES, start=1):
            for number in range(3):
                name, is_first = f"stage{stage}_block{number}", number == 0

                def bottleneck(
                    x, name=name, is_first=is_first, inner=inner, outer=outer, stride=stride if is_first else 1
                ):
                    y = x
                    if name != "stage1_block0":
                        y = self.norm(f"{name}_norm1")(y, train)
                        y = y if self.authors else nn.relu(y)
                    y = conv(inner, (1, 1), stride, name=f"{name}_conv1")(y)
                    y = nn.relu(self.norm(f"{name}_norm2")(y, train))
                    y = conv(inner, (3, 3), name=f"{name}_conv2")(y)
                    y = nn.relu(self.norm(f"{name}_norm3")(y, train))
                    y = conv(outer, (1, 1), name=f"{name}_conv3")(y)
                    if is_first:
                        x = conv(outer, (1, 1), stride, name=f"{name}_shortcut")(x)
                    return x + y

                x = self.run_block(bottleneck, x)
        x = nn.relu(self.norm("final_norm")(x, train))
        return self.logits(x.mean((1, 2)), nn.initializers.glorot_uniform() if self.authors else kernel_init)
