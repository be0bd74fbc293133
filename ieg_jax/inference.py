"""Predictions of a network that was trained: from a work folder to probabilities."""

import dataclasses
import json
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import checkpointing, models, sharding
from ieg_jax.data import pipeline
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
      config: the run's.
      network: the module.
      params: its weights, averaged where the run kept an average; on every device.
      batch_stats: its moving averages of batch norm; on every device.
      num_classes: K.
      step: updates made so far.
    """

    config: ConfigDict
    network: nn.Module
    params: Any
    batch_stats: Any
    num_classes: int
    step: int


def load(workdir: epath.PathLike) -> Trained:
    """Loads the newest checkpoint of a run, finished or interrupted. Nothing is written.

    Args:
      workdir: the run's work folder, local or on a bucket.

    Raises:
      UserError: where there is no run, or none that has saved a checkpoint.
    """
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json, expected the work folder of a run (--workdir of ieg_jax.main)")
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    layout = sharding.create(_for_these_devices(config))
    step, params, batch_stats = checkpointing.restore_weights(folder / "checkpoints", layout.replicated)
    num_classes = params["head"]["bias"].size
    return Trained(config, models.create(config.model, num_classes), params, batch_stats, num_classes, step)


def predict(trained: Trained, split: Split) -> np.ndarray:
    """The probabilities of the classes, softmax(Φ(x)), of each example as `augment.evaluation` makes it.

    Args:
      trained: from `load`.
      split: the examples; their labels are not looked at.

    Returns:
      `[n, K]` float32, in the order of the split.
    """
    config = _for_these_devices(trained.config)
    layout = sharding.create(config)

    def probabilities(params, batch_stats, image):
        variables = {"params": params, "batch_stats": batch_stats}
        return jax.nn.softmax(trained.network.apply(variables, image, train=False))

    forward = jax.jit(
        probabilities,
        in_shardings=(layout.replicated, layout.replicated, layout.batch),
        out_shardings=layout.replicated,
    )
    # Fetched batch by batch, so that no more images than those of one batch wait on the devices.
    parts = [
        np.asarray(forward(trained.params, trained.batch_stats, batch["image"]), np.float32)
        for batch in pipeline.EvalBatches(config, split, layout.batch)
    ]
    return np.concatenate(parts)[: len(split)]  # the padding is at the end


def _for_these_devices(config: ConfigDict) -> ConfigDict:
    """A copy with all devices that are here and an evaluation batch that they divide; the run may have had others."""
    config = ConfigDict(config.to_dict())
    count = len(jax.devices())
    config.mesh.data = -1
    config.eval_batch_size = math.ceil(config.eval_batch_size / count) * count
    # Of no use here, but a mesh wants to divide them too.
    config.batch_size = config.trusted.batch_size = config.eval_batch_size
    return config
