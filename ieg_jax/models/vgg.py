"""VGG-13 with batch norm (Simonyan and Zisserman 2015), in the form that is usual for 32×32 images.

Ten 3×3 convolutions and one dense layer in place of VGG's three. It is the network whose mistakes are the hardest of
the three kinds of semantic label noise (Lee et al. 2019).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.errors import UserError
from ieg_jax.models.layers import BatchNorm, DType, he_normal_fan_out, run_block

STAGES = (1, 2, 4, 8, 8)  # channels / `features`; two convolutions each, then a halving of the size


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds VGG-13 with `model.width` times its channels; `depth` and `variant` are not used.

    Raises:
      UserError: for a width that leaves no channel.
    """
    if round(64 * model.width) < 1:
        raise UserError(f"model.width: got {model.width}, which leaves vgg13 without a channel")
    return VGG13(features=round(64 * model.width), **common)


class VGG13(nn.Module):
    """9,416,010 parameters for 10 classes. Any image size: what is left after five halvings is averaged."""

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
        # The biases, which batch norm takes away again, are part of the published network.
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), kernel_init=he_normal_fan_out, **dtypes)

        for stage, multiple in enumerate(STAGES, start=1):

            def block(_, x, stage=stage, features=self.features * multiple):
                for layer in (1, 2):
                    x = conv(features, name=f"stage{stage}_conv{layer}")(x)
                    x = nn.relu(norm(name=f"stage{stage}_norm{layer}")(x, train))
                # SAME: an odd size is rounded up, so that images of less than 32 pixels do not vanish.
                return nn.max_pool(x, (2, 2), (2, 2), padding="SAME")

            x = run_block(self, block, x)
        x = x.mean((1, 2))
        head_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=head_dtype, param_dtype=self.param_dtype, name="head")(x)
