"""The registry of the networks, and how one is built from the configuration."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.models import (
    convnext,
    densenet,
    efficientnet_lite,
    inception_resnet_v2,
    mlp,
    resnet29,
    resnet50,
    resnet50_v2,
    resnet_cifar,
    tiny,
    vgg,
    vit,
    wide_resnet,
)
from ieg_jax.models.layers import Network

# name -> module, or an object of one for each size. Each has `from_config(model, **common)`, which builds the network,
# and `READS`: the keys of the group `model` that this function reads; with conventions among them `CONVENTIONS`, the
# values allowed. All networks read name, dtype, remat and pretrained besides. See also `naming`.
REGISTRY = {
    "wide_resnet": wide_resnet,
    "resnet29_v2": resnet29,
    **resnet_cifar.SIZES,
    "resnet50": resnet50,
    "resnet50_v2": resnet50_v2,
    "vgg13": vgg,
    "densenet100": densenet,
    "inception_resnet_v2": inception_resnet_v2,
    "efficientnet_lite0": efficientnet_lite,
    **vit.SIZES,
    **convnext.SIZES,
    "mlp": mlp,
    "tiny": tiny,
}


def create(model: ConfigDict, num_classes: int, batch_groups: int = 1) -> Network:
    """Builds the network that `model.name` names.

    Args:
      model: the group `model` of the configuration.
      num_classes: K, the number of logits.
      batch_groups: into how many groups batch norm divides a training batch; must divide every training batch.

    Returns:
      A linen module, which computes in `model.dtype` and has parameters in float32 or better.

    Raises:
      UserError: for a depth or a width that the network cannot have.
    """
    return REGISTRY[model.name].from_config(
        model,
        num_classes=num_classes,
        batch_groups=batch_groups,
        dtype=jnp.dtype(model.dtype),
        param_dtype=jnp.promote_types(model.dtype, jnp.float32),
        remat=model.remat,
        convolutions=model.convolutions,
    )
