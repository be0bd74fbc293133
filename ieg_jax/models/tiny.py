"""A network of two convolutions, for tests and for a first try of a pipeline."""

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network

READS = ("width",)


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network with 8 · `model.width` channels, and at least one.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.
    """
    return Tiny(features=max(1, round(8 * model.width)), **common)


class Tiny(Network):
    """Two 3×3 convolutions with batch norm, the second with stride 2, and a dense layer.

    Attributes, besides those of `Network`:
      features: the channels of both convolutions.
    """

    features: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""
        for layer, stride in enumerate((1, 2)):

            def block(x, layer=layer, stride=stride):
                kernel_init = nn.linear.default_kernel_init
                x = self.conv(self.features, (3, 3), stride, name=f"conv{layer}", kernel_init=kernel_init)(x)
                return nn.relu(self.norm(f"norm{layer}")(x, train))

            x = self.run_block(block, x)
        return self.logits(x.mean((1, 2)))
