"""Predictions of a network that was trained: from a work folder to probabilities, here or in a program that serves it.

What is served is a function that needs no code of this package: `export_stablehlo` writes it for jax alone, and
`export_saved_model` for TensorFlow.
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax import methods, models
from ieg_jax.data.batches import EvalBatches
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError
from ieg_jax.methods.base import Context
from ieg_jax.methods.parts import optimizers
from ieg_jax.models import own, pretrained
from ieg_jax.runtime import mesh
from ieg_jax.runtime.checkpoints import restore_weights
from ieg_jax.runtime.workdir import BEST, NETWORK, best_step, check_network, class_name

SIGNATURE = "signature.json"  # of an exported folder with a function: how to call it
LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, ITU-R BT.601, as Pillow makes it


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, or the R networks of a method that has several.

    Attributes:
      config: the run's.
      network: the module.
      params: its weights, averaged where the run kept an average, on every device; with R networks each array has them
        on its leading axis.
      batch_stats: its moving averages of batch norm, likewise.
      num_classes: K.
      step: updates made so far.
      class_names: `[K]`, in the order of the classes.
      image_shape: (H, W, C) of the images that the network sees, after `augment.evaluation`; of features (1, 1, D).
      memory: what the method remembers, where its predictions need it; else None.
    """

    config: ConfigDict
    network: nn.Module
    params: Any
    batch_stats: Any
    num_classes: int
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    memory: Any = None

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """What `probabilities` takes besides images."""
        return self.params, self.batch_stats, self.memory

    def probabilities(self, params: Any, batch_stats: Any, memory: Any, images: jax.Array) -> jax.Array:
        """The method's prediction, pure: images `[n, H, W, 1 or 3]` in [-1, 1], or features -> `[n, K]`.

        Grey images are repeated for a network of colours, and a network of grey gets the luma of colours.
        """
        channels = self.image_shape[2]
        if images.shape[-1] == 1 and channels == 3:
            images = jnp.repeat(images, 3, -1)
        elif images.shape[-1] == 3 and channels == 1:
            images = jnp.sum(images * jnp.asarray(LUMA, images.dtype), -1, keepdims=True)
        method = methods.get(self.config.method.name)
        context = Context(
            config=FrozenConfigDict(self.config),
            network=self.network,
            optimizer=optimizers.create(self.config.optimizer),
            num_classes=self.num_classes,
        )
        variables = {"params": params, "batch_stats": batch_stats}
        return method.bind(context).predict(variables, memory, images)


def load(workdir: epath.PathLike, step: int | str | None = None, network: nn.Module | None = None) -> Trained:
    """Loads a checkpoint of a run, finished or interrupted, or what `export` wrote. Nothing is written.

    Args:
      workdir: the run's work folder, or a folder that was exported; local or on a bucket.
      step: which checkpoint of a run, perhaps as text; None = the newest that is not damaged, BEST = see `best_step`.
      network: of a run that was trained with one of its own (`train.loop.train_and_evaluate`), that one.

    Raises:
      UserError: where there is no run, or none that has saved a checkpoint; for a step of exported weights, which
        have one only; and for another network than the run's.
    """
    folder = epath.Path(workdir)
    if isinstance(step, str) and step != BEST:
        if not step.isdecimal():
            raise UserError(f"checkpoint {step!r}, expected the number of a step, or {BEST}")
        step = int(step)
    if (folder / pretrained.MODEL).exists():
        trained = _load_exported(folder)
        if step not in (None, trained.step):
            raise UserError(f"{folder} holds exported weights, those of step {trained.step} alone, and not {step!r}")
        return trained
    if (folder / SIGNATURE).exists():
        raise UserError(
            f"{folder} holds a function without weights that can be read ({SIGNATURE} says how to call it); expected "
            f"the work folder of a run, or what ieg_jax.export wrote with --format=weights"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json, expected the work folder of a run (--workdir of ieg_jax.main)")
    config = ConfigDict(json.loads((folder / "config.json").read_text()))
    about = check_network(folder, network)
    if about is None:
        raise UserError(
            f"{folder} has no {NETWORK}: the run was begun by an older version, which did not write down what its "
            f'network sees. Put the file there: {{"class": null, "image_shape": [height, width, channels]}} of the '
            f"images after augment.evaluation, or [1, 1, D] of features"
        )
    if step == BEST:
        step = best_step(folder)
    needs_memory = methods.get(config.method.name).predicts_by_memory
    place = mesh.create(for_these_devices(config)).replicated
    step, params, batch_stats, memory = restore_weights(folder / "checkpoints", place, step, needs_memory)
    class_names, shape = tuple(json.loads((folder / "classes.json").read_text())), tuple(about["image_shape"])
    if network is None:
        network = models.create(config.model, len(class_names))
    else:
        network = own.adapt(network, len(class_names), getattr(network, "batch_groups", 1), shape)
        _check_parameters(network, params, shape)
    return Trained(config, network, params, batch_stats, len(class_names), step, class_names, shape, memory)


def _check_parameters(network: nn.Module, params: Any, shape: tuple[int, int, int]) -> None:
    images = jax.ShapeDtypeStruct((network.batch_groups, *shape), jnp.float32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    made = flatten_dict(jax.eval_shape(functools.partial(network.init, train=True), rng, images)["params"], sep="/")
    found = flatten_dict(params, sep="/")
    for path in sorted(made.keys() | found.keys()):
        sizes = [tree[path].shape if path in tree else "absent" for tree in (found, made)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the network is not the one that was trained: {path} is {sizes[0]} in the checkpoint and {sizes[1]} "
                f"in {class_name(network.module)}; give it the attributes that it had"
            )


def _load_exported(folder: epath.Path) -> Trained:
    about = json.loads((folder / pretrained.MODEL).read_text())
    config = ConfigDict(about["config"])
    with np.load(io.BytesIO((folder / pretrained.WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
        tree = unflatten_dict(dict(arrays), sep="/")
    tree = jax.device_put(tree, mesh.create(for_these_devices(config)).replicated)
    class_names = tuple(about["class_names"])
    return Trained(
        config=config,
        network=models.create(config.model, len(class_names)),
        params=tree["params"],
        batch_stats=tree.get("batch_stats", {}),
        num_classes=len(class_names),
        step=about["step"],
        class_names=class_names,
        image_shape=tuple(about["image_shape"]),
        memory=tree.get("memory"),
    )


def predict(trained: Trained, split: Split) -> np.ndarray:
    """The probabilities of the classes, as the method predicts them, of each example as `augment.evaluation` makes it.

    Args:
      trained: from `load`.
      split: the examples; their labels are not looked at. Grey images are repeated for a network of colours, and of
        colours a network of grey gets the luma.

    Returns:
      `[n, K]` float32, in the order of the split.
    """
    return predictor(trained)(split)


def predictor(trained: Trained) -> Callable[..., np.ndarray]:
    """`predict` for one split after another: it is compiled once for all of them.

    Args:
      trained: from `load`.

    Returns:
      (split, `view` = None) -> probabilities; with a number, of the augmented view of that number instead
      (`data.batches.EvalBatches`).
    """
    config = for_these_devices(trained.config)
    shardings = mesh.create(config)
    forward = jax.jit(
        trained.probabilities,
        in_shardings=(*[shardings.replicated] * 3, shardings.batch),
        out_shardings=shardings.replicated,
    )

    def predict(split: Split, view: int | None = None) -> np.ndarray:
        # Fetched batch by batch, so that no more images than those of one batch wait on the devices.
        parts = [
            np.asarray(forward(*trained.arrays, batch["image"]), np.float32)
            for batch in EvalBatches(config, split, shardings.batch, view)
        ]
        return np.concatenate(parts)[: len(split)]  # the padding is at the end

    return predict


def for_these_devices(config: ConfigDict) -> ConfigDict:
    """A copy with all devices that are here and an evaluation batch that they divide; the run may have had others."""
    config = ConfigDict(config.to_dict())
    count = len(jax.devices())
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.eval_batch_size = math.ceil(config.eval_batch_size / count) * count
    # Of no use here, but a mesh wants to divide them too.
    config.batch_size = config.trusted.batch_size = config.eval_batch_size
    return config
