"""Estimates how many operations a training takes, without compiling it.

Each method says how many forward passes of the network a step costs, where a backward pass counts as two. XLA's count
of the compiled step agrees within a few percent for networks of more than a few layers (`make bench`, `ieg_jax.plan`).
"""

import functools
import json

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import methods, models
from ieg_jax.data import backbone, published
from ieg_jax.data.batches import image_shape
from ieg_jax.train import durations

UTILIZATION = 0.4  # the share of a chip's peak that estimates of the time assume


def training_flops(config: ConfigDict) -> float:
    """Returns the floating-point operations of a whole training, without its evaluations.

    Nor is counted how a frozen backbone turns images into features, which is done once for all runs.

    Args:
      config: of a run on a published data set (`data.published`).
    """
    known = published.find(config.data)
    examples = config.data.train_size or known.num_train
    if config.backbone.name:
        shape = (1, 1, backbone.num_features(config.backbone))
    else:
        shape = _image_shape(config.augment.standard, known.image)
    config = config_lib.resolve(config, config_lib.Facts(examples, 0, min(shape[:2])))
    steps = config.num_train_steps or config.num_train_epochs * examples / config.batch_size
    steps *= durations.share_of_steps(config)
    model = json.dumps(config.model.to_dict(), sort_keys=True)
    passes = methods.get(config.method.name).passes(config)
    return passes * config.batch_size * steps * _forward_flops(model, shape, known.num_classes)


@functools.cache
def _image_shape(standard: str, size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Returns the shape (H, W, C) of the images that the network sees."""
    return image_shape(ConfigDict({"augment": {"standard": standard}}), "standard", size)


@functools.cache
def _forward_flops(model: str, shape: tuple[int, int, int], classes: int) -> float:
    """Returns the operations of a forward pass of one image, as XLA counts them before it optimises.

    Args:
      model: the group `model` of the configuration as JSON, because a dict cannot be a key of the cache.
      shape: (H, W, C) of the image.
      classes: K.
    """
    network = models.create(ConfigDict(json.loads(model) | {"convolutions": "lax"}), classes)
    image = jnp.zeros((1, *shape))
    variables = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), image)
    lowered = jax.jit(functools.partial(network.apply, train=False)).lower(variables, image)
    return lowered.cost_analysis()["flops"]
