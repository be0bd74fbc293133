"""Predictions of a network that was trained: from a work folder to probabilities."""

import dataclasses
import io
import json
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ieg_jax import checkpointing, models, sharding
from ieg_jax.data import pipeline
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError

WEIGHTS, MODEL = "weights.npz", "model.json"  # of an exported folder


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
      class_names: `[K]`, in the order of the classes; their numbers where the run did not write them down.
    """

    config: ConfigDict
    network: nn.Module
    params: Any
    batch_stats: Any
    num_classes: int
    step: int
    class_names: tuple[str, ...]


def load(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """Loads a checkpoint of a run, finished or interrupted, or what `export` wrote. Nothing is written.

    Args:
      workdir: the run's work folder, or a folder that was exported; local or on a bucket.
      step: which checkpoint of a run; None = the newest that is not damaged.

    Raises:
      UserError: where there is no run, or none that has saved a checkpoint.
    """
    folder = epath.Path(workdir)
    if (folder / MODEL).exists():
        return _load_exported(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json, expected the work folder of a run (--workdir of ieg_jax.main)")
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    layout = sharding.create(_for_these_devices(config))
    step, params, batch_stats = checkpointing.restore_weights(folder / "checkpoints", layout.replicated, step)
    num_classes = params["head"]["bias"].size
    names = folder / "classes.json"
    class_names = json.loads(names.read_text()) if names.exists() else map(str, range(num_classes))
    network = models.create(config.model, num_classes)
    return Trained(config, network, params, batch_stats, num_classes, step, tuple(class_names))


def export(trained: Trained, folder: epath.Path) -> None:
    """Writes the weights alone, for serving: no optimiser, no method, nothing that only training needs.

    Args:
      trained: from `load`.
      folder: is made. It gets `weights.npz`, an array for each path such as `params/head/kernel`, which numpy reads
        without this package, and `model.json`: configuration, classes, step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = flatten_dict({"params": trained.params, "batch_stats": trained.batch_stats}, sep="/")
    content = io.BytesIO()
    np.savez(content, **{path: np.asarray(array) for path, array in arrays.items()})
    (folder / WEIGHTS).write_bytes(content.getvalue())
    about = {
        "config": json.loads(trained.config.to_json()),
        "class_names": list(trained.class_names),
        "step": trained.step,
    }
    (folder / MODEL).write_text(json.dumps(about, indent=1) + "\n")


def _load_exported(folder: epath.Path) -> Trained:
    about = json.loads((folder / MODEL).read_text())
    config = ConfigDict(about["config"])
    layout = sharding.create(_for_these_devices(config))
    with np.load(io.BytesIO((folder / WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
        tree = unflatten_dict(dict(arrays), sep="/")
    tree = jax.device_put(tree, layout.replicated)
    class_names = tuple(about["class_names"])
    network = models.create(config.model, len(class_names))
    return Trained(
        config, network, tree["params"], tree.get("batch_stats", {}), len(class_names), about["step"], class_names
    )


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
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.eval_batch_size = math.ceil(config.eval_batch_size / count) * count
    # Of no use here, but a mesh wants to divide them too.
    config.batch_size = config.trusted.batch_size = config.eval_batch_size
    return config
