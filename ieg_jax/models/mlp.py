"""A multilayer perceptron for ready-made features: dense layers with batch norm."""

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network

READS = ("depth", "width")


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds the network with `model.depth` hidden layers of 256 · `model.width` units, and at least one unit each.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.
    """
    return MLP(depth=model.depth, features=max(1, round(256 * model.width)), **common)


class MLP(Network):
    """Hidden layers, each of a dense layer, batch norm and ReLU, and a dense layer for the logits.

    Attributes, besides those of `Network`:
      depth: the number of hidden layers.
      features: the units of a hidden layer.
    """

    depth: int = 2
    features: int = 256

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Features `[n, 1, 1, D]` -> logits `[n, K]`, float32 or better; of an image D counts all its numbers."""
        x = x.reshape(x.shape[0], -1)
        for layer in range(self.depth):

            def block(x, layer=layer):
                x = nn.Dense(self.features, use_bias=False, name=f"dense{layer}", **self.dtypes)(x)
                return nn.relu(self.norm(f"norm{layer}")(x, train))

            x = self.run_block(block, x)
        return self.logits(x)
