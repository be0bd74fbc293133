"""Wide ResNet (Zagoruyko and Komodakis 2016), in two variants.

- `standard` has pre-activation blocks. Where a block changes the shape, its shortcut is a 1×1 convolution of the
  block's activated input.
- `authors` is the network as the authors of IEG built it. Its shortcuts have no parameters: they average over pixels
  for the stride, and add channels of zeros on both sides for the width. Only the first block of the network gives its
  shortcut the activated input. Further shortcuts lead from the input of each group to its output, and from the first
  convolution to the end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import Network, scaled_channels, uniform_fan_out

READS = ("depth", "width", "variant")


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds WRN-`depth`-`width` in the variant `model.variant`.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a depth that is not 6 n + 4, and for a width that leaves no channel.
    """
    if model.depth < 10 or (model.depth - 4) % 6:
        raise UserError(f"model.depth: got {model.depth}, expected 6 n + 4 (10, 16, 22, 28, ...) for wide_resnet")
    scaled_channels(model, 16)  # refuses such a width
    return WideResNet(depth=model.depth, width=model.width, authors=model.variant == "authors", **common)


# Its arguments have names, because depth, width and number of classes in a row would be mistaken for one another.
class WideResNet(Network, kw_only=True):
    """WRN-`depth`-`width` for small images: groups of 16, 32 and 64 times `width` channels, the last two with stride 2.

    Attributes, besides those of `Network`:
      depth: the number of layers with weights, 6 n + 4 where each group has n blocks.
      width: the multiple of the channels.
      authors: whether it is the variant `authors` or `standard`, see above.
    """

    depth: int
    width: float
    authors: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""

        def normalized(name, x):
            return nn.relu(self.norm(name)(x, train))

        widths = [round(usual * self.width) for usual in (16, 32, 64)]
        x = self.conv(min(16, widths[0]), (3, 3), name="init_conv")(x)
        network_input = x
        for group, (features, group_stride) in enumerate(zip(widths, (1, 2, 2), strict=True), start=1):
            group_input = x
            for block in range((self.depth - 4) // 6):
                name = f"group{group}_block{block}"
                stride = group_stride if block == 0 else 1

                def pre_activation(x, name=name, features=features, stride=stride):
                    activated = normalized(f"{name}_norm1", x)
                    if self.authors:
                        shortcut = activated if name == "group1_block0" else x
                        shortcut = _pad_and_pool(shortcut, features, stride)
                    elif x.shape[-1] != features or stride != 1:
                        shortcut = self.conv(features, (1, 1), stride, name=f"{name}_shortcut")(activated)
                    else:
                        shortcut = x
                    y = self.conv(features, (3, 3), stride, name=f"{name}_conv1")(activated)
                    y = normalized(f"{name}_norm2", y)
                    return shortcut + self.conv(features, (3, 3), name=f"{name}_conv2")(y)

                x = self.run_block(pre_activation, x)
            if self.authors:
                x = x + _pad_and_pool(group_input, features, group_stride)
        if self.authors:
            x = x + _pad_and_pool(network_input, widths[-1], 4)
        x = normalized("final_norm", x).mean((1, 2))
        return self.logits(x, uniform_fan_out if self.authors else nn.linear.default_kernel_init)


def _pad_and_pool(x: jax.Array, features: int, stride: int) -> jax.Array:
    """The shortcut without parameters: the mean over `stride` × `stride` pixels, with zeros up to `features` channels.

    Args:
      x: `[n, H, W, C]`, of C <= `features` channels; with C = `features` it is returned as it is, whatever the stride.
      features: the channels of the result. The zeros stand before and after those of x, in equal parts.
      stride: the factor by which height and width shrink, rounded up.
    """
    if x.shape[-1] == features:
        return x
    if stride > 1:
        # SAME pads an odd size, as the convolution with a stride beside it does; means leave the padding out.
        x = nn.avg_pool(x, (stride, stride), (stride, stride), padding="SAME", count_include_pad=False)
    before = (features - x.shape[-1]) // 2
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, features - x.shape[-1] - before)))
