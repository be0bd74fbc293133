"""Inception-ResNet-v2 for photographs (Szegedy et al. 2016), as its authors' code (TF-Slim) and timm lay it out.

The network of many published WebVision results. Like theirs it does not pad the stem and the two reductions, so that
the smallest image is 75×75 pixels. Two differences from the published training: batch norm has a scale (as in timm and
all networks here; TF-Slim's has none), and there is neither dropout nor an auxiliary head.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm, DType, run_block

SMALLEST = 75  # pixels of a side: what leaves one pixel at the end

# Branches side by side, each a chain of convolutions (channels, kernel[, stride 2 without padding]).
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
    """Builds Inception-ResNet-v2 with `model.width` times its channels; `depth` and `variant` are not used.

    Raises:
      UserError: for a width that leaves no channel.
    """
    if round(32 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves inception_resnet_v2 without a channel")
    return InceptionResNetV2(width=model.width, **common)


class InceptionResNetV2(nn.Module):
    """55,843,464 parameters for 1000 classes. Made for 299×299 pixels, of which 8×8 are left at the end.

    Attributes:
      num_classes: K.
      width: multiple of the channels.
      repeats: how often each of the three residual blocks follows on itself; the last stands once more, without ReLU.
      batch_groups: groups of batch norm.
      dtype: of the computation.
      param_dtype: of the parameters.
      remat: see `layers.run_block`.
    """

    num_classes: int
    width: float = 1.0
    repeats: tuple[int, int, int] = (10, 20, 9)
    batch_groups: int = 1
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better.

        Raises:
          UserError: for images that would vanish.
        """
        if min(x.shape[1:3]) < SMALLEST:
            raise UserError(
                f"model.name=inception_resnet_v2: got images of {x.shape[1]}×{x.shape[2]} pixels, expected at least "
                f"{SMALLEST} a side; enlarge them with data.image_size or resize(...) in augment.standard"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(BatchNorm, groups=self.batch_groups, epsilon=1e-3, **dtypes)
        conv = functools.partial(nn.Conv, kernel_init=nn.initializers.he_normal(), **dtypes)

        def unit(name, x, channels, kernel, stride=1, padding="SAME"):
            channels = round(channels * self.width)
            x = conv(channels, kernel, stride, padding=padding, use_bias=False, name=f"{name}_conv")(x)
            return nn.relu(norm(name=f"{name}_norm")(x, train))

        def branches(name, x, chains):
            ends = []
            for branch, chain in enumerate(chains):
                y = x
                for layer, (channels, kernel, *stride) in enumerate(chain):
                    without = (*stride, "VALID") if stride else ()
                    y = unit(f"{name}_branch{branch}_{layer}", y, channels, kernel, *without)
                ends.append(y)
            return ends

        def shrink(x):
            return nn.max_pool(x, (3, 3), (2, 2), padding="VALID")

        def stem(_, x):
            x = unit("conv_1a", x, 32, (3, 3), 2, "VALID")
            x = unit("conv_2a", x, 32, (3, 3), 1, "VALID")
            x = shrink(unit("conv_2b", x, 64, (3, 3)))
            x = unit("conv_3b", x, 80, (1, 1), 1, "VALID")
            return shrink(unit("conv_4a", x, 192, (3, 3), 1, "VALID"))

        def mixed_5b(_, x):
            pooled = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
            pooled = unit("mixed_5b_branch3_0", pooled, 64, (1, 1))
            return jnp.concatenate([*branches("mixed_5b", x, MIXED_5B), pooled], -1)

        def reduction(_, x, name, chains):
            return jnp.concatenate([*branches(name, x, chains), shrink(x)], -1)

        def residual(_, x, name, chains, scale, last=False):
            y = jnp.concatenate(branches(name, x, chains), -1)
            x = x + scale * conv(x.shape[-1], (1, 1), name=f"{name}_up")(y)
            return x if last else nn.relu(x)

        def repeat(x, count, name, chains, scale):
            for number in range(count):
                block = functools.partial(residual, name=f"{name}_{number}", chains=chains, scale=scale)
                x = run_block(self, block, x)
            return x

        x = run_block(self, stem, x)
        x = run_block(self, mixed_5b, x)
        x = repeat(x, self.repeats[0], "block35", BLOCK35, 0.17)
        x = run_block(self, functools.partial(reduction, name="mixed_6a", chains=MIXED_6A), x)
        x = repeat(x, self.repeats[1], "block17", BLOCK17, 0.10)
        x = run_block(self, functools.partial(reduction, name="mixed_7a", chains=MIXED_7A), x)
        x = repeat(x, self.repeats[2], "block8", BLOCK8, 0.20)
        final = functools.partial(residual, name="block8_last", chains=BLOCK8, scale=1.0, last=True)
        x = run_block(self, final, x)
        x = unit("conv_7b", x, 1536, (1, 1)).mean((1, 2))
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x)
