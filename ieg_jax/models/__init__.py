"""Networks: one file per family, one registry.

Every network is a Flax linen module with the attributes `num_classes`, `batch_groups`, `dtype` and `remat`, called as
`network(images, train)`: float32 images `[n, H, W, C]` in, float32 logits `[n, K]` out. Its last layer is a dense
layer named `head`. With `remat` the backward pass computes each block anew from its input (`layers.block`).
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models import densenet, inception_resnet_v2, mlp, resnet29, resnet50, tiny, vgg, wide_resnet

# name -> function(model config, **attributes common to all networks) -> module
REGISTRY = {
    "wide_resnet": wide_resnet.from_config,
    "resnet29_v2": resnet29.from_config,
    "resnet50": resnet50.from_config,
    "vgg13": vgg.from_config,
    "densenet100": densenet.from_config,
    "inception_resnet_v2": inception_resnet_v2.from_config,
    "mlp": mlp.from_config,
    "tiny": tiny.from_config,
}


def create(model: ConfigDict, num_classes: int, batch_groups: int = 1) -> nn.Module:
    """Builds the network that `config.model` names.

    Args:
      model: the group `model` of the configuration.
      num_classes: K.
      batch_groups: groups over which batch norm computes its statistics; must divide every training batch.

    Returns:
      A linen module, computing in `model.dtype`, with parameters in float32 or better.
    """
    return REGISTRY[model.name](
        model,
        num_classes=num_classes,
        batch_groups=batch_groups,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.promote_types(model.dtype, jnp.float32),
        remat=model.remat,
    )
