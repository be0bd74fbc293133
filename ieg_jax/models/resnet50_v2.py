"""ResNet-50 version 2, with pre-activation blocks (He et al. 2016, "Identity Mappings in Deep Residual Networks").

The authors' code for WebVision uses this network. A block is x + conv1×1(act(conv3×3(act(conv1×1(act(x)))))), where act
is batch norm and ReLU, and the shortcut is conv1×1(act(x)) where the shape changes. The 3×3 convolution has the stride.
Convolutions with a stride are padded alike on both sides, the pooling by SAME, and moving averages of batch norm keep
0.997 of their old value, all as in TensorFlow's published model. The first convolution is followed by neither batch
norm nor ReLU, which the first block begins with.
"""

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax.models.layers import Network, scaled_channels
from ieg_jax.models.resnet50 import BLOCKS, EXPANSION

READS = ("width",)
MOMENTUM = 0.997


def from_config(model: ConfigDict, **common) -> nn.Module:
    """Builds it with `model.width` times its channels.

    Args:
      model: the group `model` of the configuration.
      **common: the attributes of `Network`.

    Raises:
      UserError: for a width that leaves no channel.
    """
    return ResNet50V2(features=scaled_channels(model, 64), **common)


class ResNet50V2(Network):
    """It has 25,549,352 parameters for 1000 classes, and halves the usual 224×224 pixels five times, rounding up.

    Attributes, besides those of `Network`:
      features: the channels of the first convolution and the inner width of the first stage; it doubles in each stage.
    """

    features: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[n, H, W, C]` -> logits `[n, K]`, float32 or better."""

        def act(x, name):
            return nn.relu(self.norm(name, momentum=MOMENTUM)(x, train))

        x = self.conv(self.features, (7, 7), 2, padding=3, name="init_conv")(x)
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(BLOCKS, start=1):
            inner = self.features * 2 ** (stage - 1)
            for number in range(blocks):

                def bottleneck(x, name=f"stage{stage}_block{number}", inner=inner, first=not number, stage=stage):
                    stride = 2 if first and stage > 1 else 1
                    y = act(x, f"{name}_norm1")
                    if first:
                        x = self.conv(EXPANSION * inner, (1, 1), stride, name=f"{name}_shortcut")(y)
                    y = act(self.conv(inner, (1, 1), name=f"{name}_conv1")(y), f"{name}_norm2")
                    y = act(self.conv(inner, (3, 3), stride, padding=1, name=f"{name}_conv2")(y), f"{name}_norm3")
                    return x + self.conv(EXPANSION * inner, (1, 1), name=f"{name}_conv3")(y)

                x = self.run_block(bottleneck, x)
        return self.logits(act(x, "final_norm").mean((1, 2)))
