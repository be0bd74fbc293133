"""Predictions of a network that was trained: from a work folder to probabilities, here or in a program that serves it.

What is served is a function that needs no code of this package: `export_stablehlo` writes it for jax alone, and
`export_saved_model` for TensorFlow.
"""

import dataclasses
import functools
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ieg_jax import checkpointing, models, program, sharding
from ieg_jax.data import pipeline
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError, first_line
from ieg_jax.workdir import WorkFolder, provenance

WEIGHTS, MODEL = "weights.npz", "model.json"  # of an exported folder
NETWORK = "network.json"  # of a run whose network is not of the registry
STABLEHLO, SIGNATURE = "model.stablehlo", "signature.json"  # of one with a function
PLATFORMS = ("cpu", "tpu", "cuda")  # that one file runs on
INPUTS = {"uint8": (0, 255), "float32": (0.0, 1.0)}  # dtypes of the images of a function: black, white
BEST = "best"  # in place of a step
LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, ITU-R BT.601, as Pillow makes it
# Pixels of a side, of images that come in one size.
SIDES = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}


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
      exported_image_shape: what `image_shape` was when the weights were exported, or of a run with a network of one's
        own; None for another run, and where it was not known.
    """

    config: ConfigDict
    network: nn.Module
    params: Any
    batch_stats: Any
    num_classes: int
    step: int
    class_names: tuple[str, ...]
    exported_image_shape: tuple[int, int, int] | None = None


def load(workdir: epath.PathLike, step: int | str | None = None, network: nn.Module | None = None) -> Trained:
    """Loads a checkpoint of a run, finished or interrupted, or what `export` wrote. Nothing is written.

    Args:
      workdir: the run's work folder, or a folder that was exported; local or on a bucket.
      step: which checkpoint of a run, perhaps as text; None = the newest that is not damaged, BEST = see `best_step`.
      network: of a run that was trained with one of its own (`train.train_and_evaluate`), that one.

    Raises:
      UserError: where there is no run, or none that has saved a checkpoint; for a step of exported weights, which
        have one only; and for another network than the run's.
    """
    folder = epath.Path(workdir)
    if isinstance(step, str) and step != BEST:
        if not step.isdecimal():
            raise UserError(f"checkpoint {step!r}, expected the number of a step, or {BEST}")
        step = int(step)
    if (folder / MODEL).exists():
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
    if step == BEST:
        step = best_step(folder)
    layout = sharding.create(_for_these_devices(config))
    step, params, batch_stats = checkpointing.restore_weights(folder / "checkpoints", layout.replicated, step)
    names = folder / "classes.json"
    if network is not None:
        class_names, shape = tuple(json.loads(names.read_text())), tuple(about["image_shape"])
        network = program.adapt(network, len(class_names), getattr(network, "batch_groups", 1), shape)
        _check_parameters(network, params, shape)
        return Trained(config, network, params, batch_stats, len(class_names), step, class_names, shape)
    num_classes = params["head"]["bias"].size
    class_names = json.loads(names.read_text()) if names.exists() else map(str, range(num_classes))
    network = models.create(config.model, num_classes)
    return Trained(config, network, params, batch_stats, num_classes, step, tuple(class_names))


def class_name(network: nn.Module) -> str:
    """What a network from outside of the registry is called in files."""
    return type(network).__name__


def check_network(folder: epath.Path, network: nn.Module | None) -> dict[str, Any] | None:
    """What a work folder says of a network of one's own; None where its run has none, or has not begun.

    Args:
      folder: the work folder.
      network: the one at hand, None = that of the configuration.

    Raises:
      UserError: where it is not of the same class.
    """
    if not (folder / "config.json").exists():
        return None
    file = folder / NETWORK
    about = json.loads(file.read_text()) if file.exists() else None
    wanted, got = about and about["class"], None if network is None else class_name(network)
    if wanted != got:
        raise UserError(
            f"{folder} was trained with {f'the network {wanted}' if wanted else 'the network of its configuration'}, "
            f"and here it is {got or 'that of the configuration'}; give network={f'{wanted}(...)' if wanted else None}"
        )
    return about


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


def best_step(folder: epath.PathLike) -> int:
    """Step of the best checkpoint that a run has kept, by its `checkpoint.best_metric`; of equal ones the last.

    Args:
      folder: the work folder.

    Raises:
      UserError: where no checkpoint was evaluated.
    """
    folder = epath.Path(folder)
    keys = json.loads((folder / "config.json").read_text())["checkpoint"]
    metric, sign = keys["best_metric"], 1 if keys["best_mode"] == "max" else -1
    checkpoints = folder / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    kept = sorted(int(name) for name in names if name.isdigit())
    values = {row["step"]: sign * row[metric] for row in WorkFolder(folder, writes=False).rows() if metric in row}
    candidates = [step for step in kept if step in values]
    if not candidates:
        raise UserError(
            f"{folder}: {metric} (checkpoint.best_metric) is in metrics.jsonl for none of the checkpoints "
            f"{', '.join(map(str, kept)) or '(there are none)'}; name one by its step"
        )
    return max(candidates, key=lambda step: (values[step], step))


def image_shape(trained: Trained) -> tuple[int, int, int] | None:
    """(H, W, C) of the images that the network sees, after `augment.evaluation`; of features (1, 1, D).

    It follows from the configuration; for `data.name=arrays` from the file that the run was trained on. None where
    neither says it.
    """
    if trained.exported_image_shape:
        return trained.exported_image_shape
    config, channels = trained.config, _channels(trained)
    if config.data.name == "features":
        return (1, 1, channels)
    side = config.data.image_size or SIDES.get(config.data.name)
    size = (side, side) if side else _size_of_arrays(config.data)
    try:
        height, width, _ = pipeline.image_shape(config, "evaluation", size and (*size, channels))
    except UserError:  # each image has a size of its own
        return None
    return (height, width, channels)


def _size_of_arrays(data: ConfigDict) -> tuple[int, int] | None:
    """(H, W) of the images in the file of a run on arrays, read from the header; None where the file is gone."""
    if data.name != "arrays":
        return None
    try:
        with zipfile.ZipFile(pathlib.Path(data.train).expanduser()) as archive, archive.open("images.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)[0][1:3]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _channels(trained: Trained) -> int:
    """C of the images that a network takes: its first kernel alone has 1 or 3 inputs, or is that of features."""
    if trained.exported_image_shape:
        return trained.exported_image_shape[2]
    leaves = flatten_dict(trained.params, sep="/")
    kernels = {path: leaf.shape for path, leaf in leaves.items() if path.endswith("kernel")}
    convolutions = [shape[2] for shape in kernels.values() if len(shape) == 4]
    return min(convolutions) if convolutions else kernels.get("dense0/kernel", kernels["head/kernel"])[0]


def export(trained: Trained, folder: epath.Path) -> None:
    """Writes the weights alone, for serving: no optimiser, no method, nothing that only training needs.

    Args:
      trained: from `load`.
      folder: is made. It gets `weights.npz`, an array for each path such as `params/head/kernel`, which numpy reads
        without this package, and `model.json`: configuration, classes, step.

    Raises:
      UserError: for a network that is not of the registry, which the folder could not name.
    """
    if isinstance(trained.network, program.OwnNetwork):
        raise UserError(
            f"the weights of {class_name(trained.network.module)}, which is no network of model.name, cannot be "
            f"exported alone; keep the work folder, or export the function (export_stablehlo)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    arrays = flatten_dict({"params": trained.params, "batch_stats": trained.batch_stats}, sep="/")
    content = io.BytesIO()
    np.savez(content, **{path: np.asarray(array) for path, array in arrays.items()})
    (folder / WEIGHTS).write_bytes(content.getvalue())
    about = {
        "config": json.loads(trained.config.to_json()),
        "class_names": list(trained.class_names),
        "step": trained.step,
        "image_shape": image_shape(trained),
    }
    (folder / MODEL).write_text(json.dumps(about, indent=1) + "\n")


def _load_exported(folder: epath.Path) -> Trained:
    about = json.loads((folder / MODEL).read_text())
    config = ConfigDict(about["config"])
    layout = sharding.create(_for_these_devices(config))
    with np.load(io.BytesIO((folder / WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
        tree = unflatten_dict(dict(arrays), sep="/")
    tree = jax.device_put(tree, layout.replicated)
    class_names, shape = tuple(about["class_names"]), about.get("image_shape")
    return Trained(
        config=config,
        network=models.create(config.model, len(class_names)),
        params=tree["params"],
        batch_stats=tree.get("batch_stats", {}),
        num_classes=len(class_names),
        step=about["step"],
        class_names=class_names,
        exported_image_shape=shape and tuple(shape),
    )


def predict(trained: Trained, split: Split) -> np.ndarray:
    """The probabilities of the classes, softmax(Φ(x)), of each example as `augment.evaluation` makes it.

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
      (`pipeline.EvalBatches`).
    """
    config = _for_these_devices(trained.config)
    layout = sharding.create(config)
    forward = jax.jit(
        functools.partial(_probabilities, trained.network, _channels(trained)),
        in_shardings=(layout.replicated, layout.replicated, layout.batch),
        out_shardings=layout.replicated,
    )

    def predict(split: Split, view: int | None = None) -> np.ndarray:
        # Fetched batch by batch, so that no more images than those of one batch wait on the devices.
        parts = [
            np.asarray(forward(trained.params, trained.batch_stats, batch["image"]), np.float32)
            for batch in pipeline.EvalBatches(config, split, layout.batch, view)
        ]
        return np.concatenate(parts)[: len(split)]  # the padding is at the end

    return predict


def _probabilities(network: nn.Module, channels: int, params: Any, batch_stats: Any, image: jax.Array) -> jax.Array:
    """softmax(Φ(x)) `[n, K]` of images `[n, H, W, 1 or 3]` in [-1, 1], whichever the network takes, or of features."""
    if image.shape[-1] == 1 and channels == 3:
        image = jnp.repeat(image, 3, -1)
    elif image.shape[-1] == 3 and channels == 1:
        image = jnp.sum(image * jnp.asarray(LUMA, image.dtype), -1, keepdims=True)
    variables = {"params": params, "batch_stats": batch_stats}
    return jax.nn.softmax(network.apply(variables, image, train=False))


@dataclasses.dataclass(frozen=True)
class Served:
    """A function that was exported, with what it says about itself.

    Attributes:
      call: images `[n, H, W, C]`, of any n -> probabilities `[n, K]` float32.
      signature: the contents of `signature.json`.
    """

    call: Callable[[np.ndarray], jax.Array]
    signature: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """`[K]`, in the order of the probabilities."""
        return tuple(self.signature["class_names"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The probabilities of the classes.

        Args:
          images: `[n, H, W, C]`, n at least 1, of the dtype and range in the signature.

        Returns:
          `[n, K]` float32.

        Raises:
          UserError: for images of another shape or dtype.
        """
        images, wanted = np.asarray(images), self.signature["input"]
        shape, dtype = tuple(wanted["shape"]), wanted["dtype"]
        if images.ndim != 4 or not len(images) or images.shape[1:] != shape[1:] or images.dtype != dtype:
            low, high = wanted["range"]
            raise UserError(
                f"images of shape {images.shape}, {images.dtype}; expected [n, {', '.join(map(str, shape[1:]))}], "
                f"{dtype} from {low} to {high}"
            )
        return np.asarray(self.call(images))


def export_stablehlo(trained: Trained, folder: epath.Path, dtype: str = "uint8") -> None:
    """Writes the prediction as a program, weights included, that jax alone runs on any of PLATFORMS.

    Args:
      trained: from `load`.
      folder: is made. It gets `model.stablehlo` (`jax.export`) and `signature.json`.
      dtype: of the images: uint8, 0 to 255, or float32, 0 to 1. `augment.evaluation` is not part of the function; what
        it makes of an image goes in.

    Raises:
      UserError: see `_served`.
    """
    served, shape = _served(trained, dtype)
    (number,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(jax.jit(served), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((number, *shape), np.dtype(dtype))
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STABLEHLO).write_bytes(exported.serialize())
    _write_signature(trained, folder, dtype, shape, {"format": "stablehlo", "platforms": list(exported.platforms)})


def load_stablehlo(folder: epath.PathLike) -> Served:
    """What `export_stablehlo` wrote, ready to be called: no network is built, no weights are read besides.

    Raises:
      UserError: where there is no such thing, and where this jax cannot read it.
    """
    folder = epath.Path(folder)
    if not (folder / STABLEHLO).exists():
        raise UserError(f"{folder} has no {STABLEHLO}, expected what ieg_jax.export wrote with --format=stablehlo")
    signature = json.loads((folder / SIGNATURE).read_text())
    try:
        exported = jax.export.deserialize(bytearray((folder / STABLEHLO).read_bytes()))
    except Exception as error:  # whatever the library meets in a damaged file, or one of another age
        raise UserError(
            f"{folder / STABLEHLO} cannot be read by jax {jax.__version__} ({first_line(error)}); it was written by "
            f"jax {signature['versions']['jax']}: export it anew"
        ) from None
    return Served(jax.jit(exported.call), signature)


def export_saved_model(trained: Trained, folder: epath.Path, dtype: str = "uint8") -> None:
    """Writes the prediction as a SavedModel, which TensorFlow and its servers run without jax.

    Args:
      trained: from `load`.
      folder: is made. It gets the SavedModel, with the signature `serving_default`, `image` -> `probabilities`, and
        `signature.json`.
      dtype: as for `export_stablehlo`.

    Raises:
      UserError: see `_served`; and where this TensorFlow is too old for this jax, before anything is written.
    """
    import tensorflow as tf
    from jax.experimental import jax2tf

    served, shape = _served(trained, dtype)
    converted = jax2tf.convert(
        served,
        polymorphic_shapes=[f"(n, {', '.join(map(str, shape))})"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module = tf.Module()
    specification = tf.TensorSpec([None, *shape], dtype, "image")
    module.serve = tf.function(
        lambda image: {"probabilities": converted(image)}, autograph=False, input_signature=[specification]
    )
    try:
        module.serve(tf.zeros([1, *shape], dtype))
    except tf.errors.OpError as error:  # a program of newer operations than this TensorFlow has
        raise UserError(
            f"TensorFlow {tf.__version__} cannot run what jax {jax.__version__} makes for it: "
            f"{error.message.splitlines()[0][:200]}; take --format=stablehlo, or versions of the same age (jax 0.10.2 "
            f"and TensorFlow 2.21.0 go together)"
        ) from None
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    _write_signature(trained, folder, dtype, shape, {"format": "saved_model", "platforms": list(PLATFORMS)})


def load_saved_model(folder: epath.PathLike) -> Served:
    """What `export_saved_model` wrote, run by TensorFlow."""
    import tensorflow as tf

    folder = epath.Path(folder)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    signature = json.loads((folder / SIGNATURE).read_text())
    return Served(lambda images: serve(image=tf.constant(images))["probabilities"].numpy(), signature)


def largest_difference(trained: Trained, served: Served, count: int = 3) -> float:
    """How far the probabilities of a function are from those of the network that it was made of, on random images.

    Args:
      trained: the network.
      served: the function.
      count: images.
    """
    _, *shape = served.signature["input"]["shape"]
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)
    given = pixels if served.signature["input"]["dtype"] == "uint8" else pixels / np.float32(255)
    here = jax.jit(functools.partial(_probabilities, trained.network, shape[-1]))
    weights = jax.device_get((trained.params, trained.batch_stats))
    expected = here(*weights, pixels / np.float32(127.5) - 1)
    return float(np.abs(served(given) - np.asarray(expected, np.float32)).max())


def _served(trained: Trained, dtype: str) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, int, int]]:
    """The function images `[n, H, W, C]` of `dtype` -> probabilities `[n, K]` float32, and (H, W, C).

    Raises:
      UserError: for features, whose mean and deviation are not part of the weights, and where the size of the images
        is not known.
    """
    data = trained.config.data
    if data.name == "features":
        raise UserError("a network of features is exported with --format=weights alone; ieg_jax.predict takes these")
    shape = image_shape(trained)
    if shape is None:
        raise UserError(
            f"how large the images are is not known: data.name={data.name}, data.train={data.train!r}, which is not "
            f"there any more, or augment.evaluation={trained.config.augment.evaluation!r} leaves each its own size; "
            f"bring the file back, or export with --format=weights"
        )
    # From the devices: constants of the function must not be tied to those that are here.
    params, batch_stats = jax.device_get((trained.params, trained.batch_stats))

    def served(image: jax.Array) -> jax.Array:
        image = image.astype(jnp.float32)
        image = image / 127.5 - 1.0 if dtype == "uint8" else image * 2.0 - 1.0  # as `data.images.to_float`
        return _probabilities(trained.network, shape[-1], params, batch_stats, image).astype(jnp.float32)

    return served, shape


def _write_signature(
    trained: Trained, folder: epath.Path, dtype: str, shape: tuple[int, int, int], more: dict[str, Any]
) -> None:
    versions = provenance()["versions"]
    about = {
        **more,
        "input": {"name": "image", "shape": ["n", *shape], "dtype": dtype, "range": INPUTS[dtype]},
        "preprocessing": {
            "image_size": trained.config.data.image_size,
            "evaluation": trained.config.augment.evaluation,
        },
        "output": {"name": "probabilities", "shape": ["n", trained.num_classes], "dtype": "float32"},
        "class_names": list(trained.class_names),
        "model": trained.config.model.name,
        "step": trained.step,
        "versions": {name: versions[name] for name in ("ieg_jax", "jax", "tensorflow")},
    }
    (folder / SIGNATURE).write_text(json.dumps(about, indent=1) + "\n")


def _for_these_devices(config: ConfigDict) -> ConfigDict:
    """A copy with all devices that are here and an evaluation batch that they divide; the run may have had others."""
    config = ConfigDict(config.to_dict())
    count = len(jax.devices())
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.eval_batch_size = math.ceil(config.eval_batch_size / count) * count
    # Of no use here, but a mesh wants to divide them too.
    config.batch_size = config.trusted.batch_size = config.eval_batch_size
    return config
