"""Networks with random weights, as `inference.load` gives them: what predicts needs no training to be tested."""

import jax
import numpy as np

from configs import default
from ieg_jax import inference, models


def trained(shape, class_names, seed=0, **keys):
    """A network for images of (H, W, C) and a configuration with these keys, `data__name="arrays"`."""
    config = default.get_config()
    config.model.name = "tiny"
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    network = models.create(config.model, len(class_names))
    rng = np.random.default_rng(seed)
    variables = network.init(jax.random.key(seed), np.zeros((1, *shape), np.float32), train=False)
    # No moving average at its first value, and no weights that are 0.
    params, batch_stats = jax.tree.map(
        lambda leaf: np.asarray(
            rng.uniform(0.5, 1.5, leaf.shape) if leaf.ndim == 1 else leaf + rng.normal(0, 0.05, leaf.shape), np.float32
        ),
        (variables["params"], variables["batch_stats"]),
    )
    return inference.Trained(config, network, params, batch_stats, len(class_names), 7, tuple(class_names), shape)


def by_hand(trained, images):
    """softmax(Φ(x)) of images in [-1, 1], in one go and in float64 from the logits on."""
    variables = {"params": trained.params, "batch_stats": trained.batch_stats}
    logits = np.asarray(trained.network.apply(variables, np.asarray(images, np.float32), train=False), np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
