"""How much work a training is, estimated without compiling it: forward passes of the network, counted.

A forward pass of B images is the unit. A backward pass with respect to the parameters costs two. What XLA counts of the
compiled step agrees within a few percent for networks of more than a few layers (`make bench`, `ieg_jax.plan`).
"""

import functools
import json

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax import models

UTILIZATION = 0.4  # of the peak, taken for estimates of the time
# Sizes of data sets that an estimate may be asked for without having them: images (H, W, C), K, N.
SIZES = {
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "fashion_mnist": ((28, 28, 1), 10, 60_000),
    "digits": ((8, 8, 1), 10, 1_297),
    "webvision": ((224, 224, 3), 1_000, 2_439_574),
}


def passes(config: ConfigDict) -> int:
    """Forward passes of B images that one step is worth; the trusted batch is taken to be as large as B.

    Args:
      config: of the run.
    """
    method, views = config.method, config.augment.num_views - 1
    consistency = method.consistency_weight > 0
    if method.name in ("supervised", "trusted_only"):
        return 3
    if method.name == "l2r":
        return 10  # lookahead 3, trusted loss 3, derivative along it 2, final backward 2
    pool = 3 * (2 + views) if method.mixup else 0
    if method.name == "eg":
        return 1 + views + pool + 2 * views * consistency
    if method.name == "mixmatch":
        return 1 + views + pool
    # Both views forward, lookahead backward 2, trusted loss 3, derivative along it 2, final backward 2.
    return 1 + views + 2 + 3 + 2 + 2 + 2 * views * consistency + pool


def training_flops(config: ConfigDict) -> float:
    """Floating-point operations of a whole training, evaluation left out.

    Args:
      config: of the run; its data set one of SIZES.
    """
    shape, classes, examples = SIZES[config.data.name]
    if config.data.name == "webvision":
        size = 299 if config.model.name == "inception_resnet_v2" else 224
        shape, classes = (size, size, 3), 50 if config.data.variant == "mini" else classes
        examples = 65_944 if config.data.variant == "mini" else examples
    elif config.data.image_size:
        shape = (config.data.image_size, config.data.image_size, shape[2])
    examples = config.data.train_size or examples
    steps = config.num_train_steps or config.num_train_epochs * examples / config.batch_size
    model = json.dumps(config.model.to_dict(), sort_keys=True)
    return passes(config) * config.batch_size * steps * _forward_flops(model, shape, classes)


@functools.cache
def _forward_flops(model: str, shape: tuple[int, int, int], classes: int) -> float:
    """Operations of the forward pass of one image, as XLA counts them before it optimises."""
    network = models.create(ConfigDict(json.loads(model)), classes)
    image = jnp.zeros((1, *shape))
    variables = jax.eval_shape(functools.partial(network.init, train=False), jax.random.key(0), image)
    lowered = jax.jit(functools.partial(network.apply, train=False)).lower(variables, image)
    return lowered.cost_analysis()["flops"]
