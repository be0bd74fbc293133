"""A trained network for programs that serve it: its weights, or a function that needs no code of this package.

`export_stablehlo` writes the function for jax alone, and `export_saved_model` for TensorFlow.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from ieg_jax import files
from ieg_jax.errors import UserError, first_line
from ieg_jax.inference.trained import SIGNATURE, Trained
from ieg_jax.models import own, pretrained
from ieg_jax.runtime.workdir import class_name, provenance

STABLEHLO = "model.stablehlo"  # of an exported folder with a function
PLATFORMS = ("cpu", "tpu", "cuda")  # that one file runs on
INPUTS = {"uint8": (0, 255), "float32": (0.0, 1.0)}  # dtypes of the images of a function: black, white


def export(trained: Trained, folder: epath.Path) -> None:
    """Writes the weights alone, for serving: no optimiser, no method, nothing that only training needs.

    Args:
      trained: from `load`.
      folder: is made. It gets `weights.npz`, an array for each path such as `params/head/kernel`, which numpy reads
        without this package, and `model.json`: configuration, classes, step.

    Raises:
      UserError: for a network that is not of the registry, which the folder could not name.
    """
    if isinstance(trained.network, own.OwnNetwork):
        raise UserError(
            f"the weights of {class_name(trained.network.module)}, which is no network of model.name, cannot be "
            f"exported alone; keep the work folder, or export the function (export_stablehlo)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"params": trained.params, "batch_stats": trained.batch_stats, "memory": trained.memory or {}}
    arrays = flatten_dict(tree, sep="/")
    arrays = {path: np.asarray(array) for path, array in arrays.items()}
    files.write_arrays(folder / pretrained.WEIGHTS, arrays, compressed=False)
    about = {
        "config": json.loads(trained.config.to_json()),
        "class_names": list(trained.class_names),
        "step": trained.step,
        "image_shape": trained.image_shape,
    }
    files.write_json(folder / pretrained.MODEL, about)


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
    files.write(folder / STABLEHLO, bytes(exported.serialize()))
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
    expected = jax.jit(trained.probabilities)(*jax.device_get(trained.arrays), pixels / np.float32(127.5) - 1)
    return float(np.abs(served(given) - np.asarray(expected, np.float32)).max())


def _served(trained: Trained, dtype: str) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, int, int]]:
    """The function images `[n, H, W, C]` of `dtype` -> probabilities `[n, K]` float32, and (H, W, C).

    Raises:
      UserError: for features, whose mean and deviation are not part of the weights.
    """
    data = trained.config.data
    if data.name == "features":
        raise UserError("a network of features is exported with --format=weights alone; ieg_jax.predict takes these")
    # From the devices: constants of the function must not be tied to those that are here.
    arrays = jax.device_get(trained.arrays)

    def served(image: jax.Array) -> jax.Array:
        image = image.astype(jnp.float32)
        image = image / 127.5 - 1.0 if dtype == "uint8" else image * 2.0 - 1.0  # as `data.images.to_float`
        return trained.probabilities(*arrays, image).astype(jnp.float32)

    return served, trained.image_shape


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
    files.write_json(folder / SIGNATURE, about)
