"""VGG-13 with batch norm (Simonyan and Zisserman 2015), in the form that is usual for 32×32 images.

It has ten 3×3 convolutions and, in place of VGG's three dense layers, one. Of the three networks whose mistakes serve
as semantic label noise (Lee et al. 2019), this one makes those that are the hardest to learn from.
"""

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network, scaled_channels

READS = ("width",)

STAGES = (1, 2, 4, 8, 8)  # channels / `features`; each stage has two convolutions and then halves the size


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds VGG-13 with `model.width` times its channels.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a width that leaves no channel.
    """
    return VGG13(features=scaled_channels(model, 64), **common)


class VGG13(Network):
    """VGG-13 has 9,416,010 parameters for 10 classes. Images may have any size: the mean over the pixels is classified.

    Attributes, besides those of `Network`:
      features: the channels of the first stage.
    """

    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        for stage, multiple in enumerate(STAGES, start=1):

            def block(x, stage=stage, features=self.features * multiple):
                for layer in (1, 2):
                    # Batch norm subtracts the biases again, but the published network has them.
                    x = self.conv(features, (3, 3), name=f"stage{stage}_conv{layer}", use_bias=True)(x)
                    x = nn.relu(self.norm(f"stage{stage}_norm{layer}")(x, train))
                # SAME rounds an odd size up, so that images of less than 32 pixels do not vanish.
                return nn.max_pool(x, (2, 2), (2, 2), padding="SAME")

            x = self.run_block(block, x)
        return self.logits(x.mean((1, 2)))
