"""DenseNet-BC-100 for small images (Huang et al. 2017): growth 12, with bottlenecks and compression.

It has three blocks of 16 layers. Each layer takes what all layers before it in its block have made, and adds `growth`
channels to it. The experiments with semantic noise of RoG (Lee et al. 2019) say DenseNet-100; their code builds this
form, not the one without bottlenecks, which has 7.0 M parameters.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network, scaled_channels

READS = ("width",)

BOTTLENECK = 4  # channels between the two convolutions of a layer / growth


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds DenseNet-BC-100 with growth 12 · `model.width`.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a width that leaves no channel.
    """
    return DenseNet(growth=scaled_channels(model, 12), **common)


class DenseNet(Network):
    """DenseNet-BC has 769,162 parameters for 10 classes. Images may have any size: two transitions halve it.

    Attributes, besides those of `Network`:
      depth: the number of layers with weights, 6 n + 4 where each block has n layers.
      growth: the channels that a layer adds.

    What `run_block` takes for a block is one layer, so that with `remat` only the channels that layers add are kept.
    """

    depth: int = 100
    growth: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""

        def normalized(name, x):
            return nn.relu(self.norm(name)(x, train))

        x = self.conv(2 * self.growth, (3, 3), name="init_conv")(x)
        for block in (1, 2, 3):
            # A layer concatenates its inputs itself: with remat they are kept once, and not once in each concatenation.
            parts = (x,)
            for layer in range((self.depth - 4) // 6):

                def dense_layer(parts, name=f"block{block}_layer{layer}"):
                    y = normalized(f"{name}_norm1", jnp.concatenate(parts, -1))
                    y = self.conv(BOTTLENECK * self.growth, (1, 1), name=f"{name}_conv1")(y)
                    return self.conv(self.growth, (3, 3), name=f"{name}_conv2")(normalized(f"{name}_norm2", y))

                parts += (self.run_block(dense_layer, parts),)
            if block < 3:

                def transition(parts, name=f"transition{block}"):
                    x = normalized(f"{name}_norm", jnp.concatenate(parts, -1))
                    x = self.conv(x.shape[-1] // 2, (1, 1), name=f"{name}_conv")(x)
                    # SAME rounds an odd size up, so that small images do not vanish; means leave the padding out.
                    return nn.avg_pool(x, (2, 2), (2, 2), padding="SAME", count_include_pad=False)

                x = self.run_block(transition, parts)
        return self.logits(normalized("final_norm", jnp.concatenate(parts, -1)).mean((1, 2)))
