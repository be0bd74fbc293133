"""Loads a trained network from a work folder or from exported weights, and predicts with it."""

import contextlib
import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files, methods, models
from ieg_jax.data.batches import EvalBatches
from ieg_jax.data.features import Features, of_run
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError
from ieg_jax.methods.base import Context, Method
from ieg_jax.methods.parts import optimizers
from ieg_jax.models import own, pretrained
from ieg_jax.runtime import mesh
from ieg_jax.runtime.checkpoints import restore_weights
from ieg_jax.runtime.workdir import BEST, NETWORK, best_step, check_network, class_name, reported_step, saved_steps

SIGNATURE = "signature.json"  # the file of an exported folder that says how to call its function
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey, as in Pillow (ITU-R BT.601)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network, or the R networks of a method that has several.

    Attributes:
      config: the configuration of the run.
      network: the module of one network.
      params: its weights on every device, averaged where the run kept an average. For R networks every array has a
        leading axis of this length.
      batch_stats: its moving averages of batch norm, in the same form.
      num_classes: K.
      step: updates made so far.
      class_names: `[K]`, in the order of the classes.
      image_shape: (H, W, C) of the images that the network sees, after `augment.evaluation`; for features (1, 1, D).
      memory: what the method remembers, where its predictions need it; else None.
      features: how images become what the network sees (`config.backbone`); None where it sees images.
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
    features: Features | None = None

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """The arguments of `probabilities` before the images."""
        return self.params, self.batch_stats, self.memory

    def probabilities(self, params: Any, batch_stats: Any, memory: Any, images: jax.Array) -> jax.Array:
        """Predicts as the method does. This is a pure function, for `jax.jit`.

        For a network of colours grey images are repeated; for a network of grey images colours become their luma.

        Args:
          params: see `arrays`.
          batch_stats: see `arrays`.
          memory: see `arrays`.
          images: `[n, H, W, 1 or 3]` float32 in [-1, 1], or features `[n, 1, 1, D]`.

        Returns:
          Probabilities `[n, K]`.
        """
        config, method = FrozenConfigDict(self.config), methods.get(self.config.method.name)
        return _probabilities(
            config, method, self.network, self.num_classes, self.image_shape[2], params, batch_stats, memory, images
        )


def _probabilities(
    config: FrozenConfigDict,
    method: Method,
    network: nn.Module,
    num_classes: int,
    channels: int,
    params: Any,
    batch_stats: Any,
    memory: Any,
    images: jax.Array,
) -> jax.Array:
    """See `Trained.probabilities`."""
    if images.shape[-1] == 1 and channels == 3:
        images = jnp.repeat(images, 3, -1)
    elif images.shape[-1] == 3 and channels == 1:
        images = jnp.sum(images * jnp.asarray(LUMA, images.dtype), -1, keepdims=True)
    context = Context(
        config=config, network=network, optimizer=optimizers.create(config.optimizer), num_classes=num_classes
    )
    variables = {"params": params, "batch_stats": batch_stats}
    return method.bind(context).predict(variables, memory, images)


def load(workdir: epath.PathLike, step: int | str | None = None, network: nn.Module | None = None) -> Trained:
    """Loads a checkpoint of a run, finished or interrupted, or what `export` wrote. Nothing is written.

    Args:
      workdir: the work folder of the run, or a folder with exported weights; local or on a bucket.
      step: which checkpoint of a run, as a number or as text; None = that whose accuracy result.json reports, of
        a run that is not finished the newest that is not damaged; BEST = the best, see `runtime.workdir.best_step`.
      network: the network of the run, where it was given to `train.loop.train_and_evaluate`; else None.

    Raises:
      UserError: where the folder has no run, or a run without that checkpoint; for another step than that of exported
        weights; and for another network than the run's.
    """
    folder = epath.Path(workdir).expanduser()
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
    config = config_lib.completed(files.read_json(folder / "config.json"))
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
    step, params, batch_stats, memory = restore_weights(
        folder / "checkpoints", place, step, needs_memory, prefer=reported_step(folder)
    )
    class_names, shape = tuple(json.loads((folder / "classes.json").read_text())), tuple(about["image_shape"])
    if network is None:
        network = models.create(config.model, len(class_names))
    else:
        network = own.adapt(network, len(class_names), getattr(network, "batch_groups", 1), shape)
        _check_parameters(network, params, shape)
    features = _features(config, about)
    return Trained(config, network, params, batch_stats, len(class_names), step, class_names, shape, memory, features)


def _features(config: ConfigDict, about: Mapping[str, Any]) -> Features | None:
    """How images become features, from what a run has written down."""
    return of_run(config.backbone, about["features"]) if about.get("features") else None


def _check_parameters(network: nn.Module, params: Any, shape: tuple[int, int, int]) -> None:
    """Raises UserError unless the parameters have the shapes that the network would give them.

    Args:
      network: from `own.adapt`.
      params: as in the checkpoint.
      shape: (H, W, C) of the images.
    """
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
    """Loads what `export` wrote."""
    about = json.loads((folder / pretrained.MODEL).read_text())
    config = config_lib.completed(about["config"])
    if not about.get("image_shape"):
        raise UserError(
            f"{folder / pretrained.MODEL} does not say what images the network sees, as an older version wrote it: add "
            f'"image_shape": [height, width, channels] of the images after augment.evaluation, or [1, 1, D] of features'
        )
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
        features=_features(config, about),
    )


def predict(trained: Trained, split: Split) -> np.ndarray:
    """Predicts the probabilities of the classes for each example of a split, after `augment.evaluation`.

    For a network of colours grey images are repeated; for a network of grey images colours become their luma.

    Args:
      trained: from `load`.
      split: the examples, images or already features; their labels have no effect.

    Returns:
      `[n, K]` float32, in the order of the split.
    """
    return predictor(trained)(split)


def predictor(trained: Trained) -> Callable[..., np.ndarray]:
    """Returns a function that predicts for one split after another, and is compiled only once for all of them.

    Args:
      trained: from `load`.

    Returns:
      (split, view = None) -> probabilities, as from `predict`. Where `view` is a number, the images are augmented as in
      training in place of `augment.evaluation`, see `data.batches.EvalBatches`.
    """
    predict = predictor_of_all([trained])
    return lambda split, view=None: predict(split, view)[0]


def predictor_of_all(networks: Sequence[Trained]) -> Callable[..., np.ndarray]:
    """Like `predictor`, of several networks of one run, such as those of `over_training`, for `[V, n, K]`."""
    trained = networks[0]
    config = for_these_devices(trained.config)
    shardings = mesh.create(config)
    about = (trained.network, trained.num_classes, trained.image_shape[2])
    # With the method, of which there may be another of the same name after a change in a notebook.
    method = methods.get(trained.config.method.name)
    forward = _compiled(config_lib.of_program(trained.config), method, *about, shardings)

    def predict(split: Split, view: int | None = None) -> np.ndarray:
        split = split if trained.features is None else trained.features.of(split)
        # Each result is fetched before the next batch is sent, so that only one batch of images is on the devices.
        parts = [
            np.stack([np.asarray(forward(*one.arrays, batch["image"]), np.float32) for one in networks])
            for batch in EvalBatches(config, split, shardings.batch, view)
        ]
        return np.concatenate(parts, 1)[:, : len(split)]  # the last batch is padded at its end

    return predict


def _forward(
    config: FrozenConfigDict,
    method: Method,
    network: nn.Module,
    num_classes: int,
    channels: int,
    shardings: mesh.Shardings,
) -> Callable[..., jax.Array]:
    return jax.jit(
        functools.partial(_probabilities, config, method, network, num_classes, channels),
        in_shardings=(*[shardings.replicated] * 3, shardings.batch),
        out_shardings=shardings.replicated,
    )


_kept = functools.lru_cache(maxsize=4)(_forward)


def _compiled(*parts: Any) -> Callable[..., jax.Array]:
    """The function that predicts: the last few are kept, for they serve any weights of the same shapes."""
    try:
        return _kept(*parts)
    except TypeError:  # someone's network that is not hashable
        return _forward(*parts)


def over_training(workdir: epath.PathLike, newest: Trained, network: nn.Module | None = None) -> list[Trained]:
    """The networks of the checkpoints that a run keeps, the newest first; those that are damaged are left out.

    Args:
      workdir: of a run.
      newest: from `load`.
      network: see `load`.
    """
    steps = saved_steps(epath.Path(workdir).expanduser() / "checkpoints")
    found = [newest]
    for step in reversed([step for step in steps if step < newest.step]):
        with contextlib.suppress(UserError):
            found.append(load(workdir, step, network))
    return found


def for_these_devices(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a run's configuration that fits the devices that are here, which may not be those of the run.

    It uses all devices, and the evaluation batch is made a multiple of their number.
    """
    config = ConfigDict(config.to_dict())
    count = len(jax.devices())
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.eval_batch_size = math.ceil(config.eval_batch_size / count) * count
    # These batches are not used, but `mesh.create` refuses sizes that the devices do not divide.
    config.batch_size = config.trusted.batch_size = config.eval_batch_size
    return config
