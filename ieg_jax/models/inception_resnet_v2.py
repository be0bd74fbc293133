"""Inception-ResNet-v2 for photographs (Szegedy et al. 2016), as its authors' code (TF-Slim) and timm build it.

Many published results on WebVision are of this network. Like theirs, it does not pad the stem and the two reductions,
so that the smallest image is 75×75 pixels. Two things differ from the published training: batch norm has a scale, as in
timm and in all networks here, whereas TF-Slim's has none; and there is neither dropout nor an auxiliary head.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import Network, scaled_channels

READS = ("width",)

SMALLEST = 75  # pixels of a side; of this size one pixel is left at the end

# Each of these has several branches side by side. A branch is a chain of convolutions: (channels, kernel), or
# (channels, kernel, 2) for one with stride 2 and without padding.
MIXED_5B = (((96, (1, 1)),), ((48, (1, 1)), (64, (5, 5))), ((64, (1, 1)), (96, (3, 3)), (96, (3, 3))))
MIXED_6A = (((384, (3, 3), 2),), ((256, (1, 1)), (256, (3, 3)), (384, (3, 3), 2)))
MIXED_7A = (
    ((256, (1, 1)), (384, (3, 3), 2)),
    ((256, (1, 1)), (288, (3, 3), 2)),
    ((256, (1, 1)), (288, (3, 3)), (320, (3, 3), 2)),
)
BLOCK35 = (((32, (1, 1)),), ((32, (1, 1)), (32, (3, 3))), ((32, (1, 1)), (48, (3, 3)), (64, (3, 3))))
BLOCK17 = (((192, (1, 1)),), ((128, (1, 1)), (160, (1, 7)), (192, (7, 1))))
BLOCK8 = (((192, (1, 1)),), ((192, (1, 1)), (224, (1, 3)), (256, (3, 1))))


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds Inception-ResNet-v2 with `model.width` times its channels.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a width that leaves no channel.
    """
    scaled_channels(model, 32)  # refuses such a width; no layer has fewer channels
    return InceptionResNetV2(width=model.width, **common)


class InceptionResNetV2(Network):
    """Inception-ResNet-v2 has 55,843,464 parameters for 1000 classes. Of its usual 299×299 pixels it leaves 8×8.

    Attributes, besides those of `Network`:
      width: the multiple of the channels.
      repeats: how many residual blocks of each of the three kinds follow one another. After those of the last kind
        comes one more, without a ReLU.
    """

    width: float = 1.0
    repeats: tuple[int, int, int] = (10, 20, 9)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        Raises:
          UserError: for images of fewer than 75 pixels a side, of which nothing would be left.
        """
        if min(x.shape[1:3]) < SMALLEST:
            raise UserError(
                f"model.name=inception_resnet_v2: got images of {x.shape[1]}×{x.shape[2]} pixels, expected at least "
                f"{SMALLEST} a side; enlarge them with data.image_size or resize(...) in augment.standard"
            )
        conv = functools.partial(self.conv, kernel_init=nn.initializers.he_normal())

        def unit(name, x, channels, kernel_size, stride=1, padding="SAME"):
            channels = round(channels * self.width)
            x = conv(channels, kernel_size, stride, padding=padding, name=f"{name}_conv")(x)
            return nn.relu(self.norm(f"{name}_norm", epsilon=1e-3)(x, train))

        def branches(name, x, chains):
            ends = []
            for branch, chain in enumerate(chains):
                y = x
                for layer, (channels, kernel_size, *stride) in enumerate(chain):
                    reducing = (*stride, "VALID") if stride else ()
                    y = unit(f"{name}_branch{branch}_{layer}", y, channels, kernel_size, *reducing)
                ends.append(y)
            return ends

        def shrink(x):
            return nn.max_pool(x, (3, 3), (2, 2), padding="VALID")

        def stem(x):
            x = unit("conv_1a", x, 32, (3, 3), 2, "VALID")
            x = unit("conv_2a", x, 32, (3, 3), 1, "VALID")
            x = shrink(unit("conv_2b", x, 64, (3, 3)))
            x = unit("conv_3b", x, 80, (1, 1), 1, "VALID")
            return shrink(unit("conv_4a", x, 192, (3, 3), 1, "VALID"))

        def mixed_5b(x):
            pooled = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
            pooled = unit("mixed_5b_branch3_0", pooled, 64, (1, 1))
            return jnp.concatenate([*branches("mixed_5b", x, MIXED_5B), pooled], -1)

        def reduction(x, name, chains):
            return jnp.concatenate([*branches(name, x, chains), shrink(x)], -1)

        def residual(x, name, chains, scale, is_last=False):
            y = jnp.concatenate(branches(name, x, chains), -1)
            x = x + scale * conv(x.shape[-1], (1, 1), name=f"{name}_up", use_bias=True)(y)
            return x if is_last else nn.relu(x)

        def repeat(x, count, name, chains, scale):
            for number in range(count):
                block = functools.partial(residual, name=f"{name}_{number}", chains=chains, scale=scale)
                x = self.run_block(block, x)
            return x

        x = self.run_block(stem, x)
        x = self.run_block(mixed_5b, x)
        x = repeat(x, self.repeats[0], "block35", BLOCK35, 0.17)
        x = self.run_block(functools.partial(reduction, name="mixed_6a", chains=MIXED_6A), x)
        x = repeat(x, self.repeats[1], "block17", BLOCK17, 0.10)
        x = self.run_block(functools.partial(reduction, name="mixed_7a", chains=MIXED_7A), x)
        x = repeat(x, self.repeats[2], "block8", BLOCK8, 0.20)
        final = functools.partial(residual, name="block8_last", chains=BLOCK8, scale=1.0, is_last=True)
        x = self.run_block(final, x)
        return self.logits(unit("conv_7b", x, 1536, (1, 1)).mean((1, 2)))
