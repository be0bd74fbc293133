"""Exports a trained network for programs that serve it.

`export` writes its weights. `export_stablehlo` and `export_saved_model` write a function that needs no code of this
package, but only jax or only TensorFlow.
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
from ieg_jax.data.splits import make_split
from ieg_jax.errors import UserError, first_line
from ieg_jax.inference.trained import SIGNATURE, Trained
from ieg_jax.lazy import tf
from ieg_jax.models import own, pretrained
from ieg_jax.runtime.workdir import class_name, provenance

STABLEHLO = "model.stablehlo"  # the file of a function in an exported folder
PLATFORMS = ("cpu", "tpu", "cuda")  # an exported function runs on each of them
INPUTS = {"uint8": (0, 255), "float32": (0.0, 1.0)}  # dtype of the images that a function takes -> (black, white)


def export(trained: Trained, folder: epath.Path) -> None:
    """Writes the weights for serving, without the optimiser's state and whatever else only training needs.

    Args:
      trained: from `load`.
      folder: is made. It gets `weights.npz`, with an array for each path such as `params/head/kernel`, which numpy
        reads without this package; and `model.json`, with the configuration, the classes, the step and the shape of
        images.

    Raises:
      UserError: for a network that is not in the registry, because the folder could not say how to build it.
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
    if trained.features is not None:  # the weights of the backbone stay where they are
        about["features"] = trained.features.to_json()
    files.write_json(folder / pretrained.MODEL, about)


@dataclasses.dataclass(frozen=True)
class Served:
    """An exported function and its signature.

    Attributes:
      call: the function: images `[n, H, W, C]`, for any n -> probabilities `[n, K]` float32.
      signature: the contents of `signature.json`.
    """

    call: Callable[[np.ndarray], jax.Array]
    signature: dict[str, Any]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, `[K]`, in the order of the probabilities."""
        return tuple(self.signature["class_names"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Computes the probabilities of the classes.

        Args:
          images: `[n, H, W, C]`, n at least 1, with the dtype and range that the signature says.

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
    """Writes the prediction as a program with its weights, which jax alone runs on any of PLATFORMS.

    Args:
      trained: from `load`.
      folder: is made. It gets `model.stablehlo` (see `jax.export`) and `signature.json`.
      dtype: of the images: uint8, from 0 to 255, or float32, from 0 to 1. The function does not apply
        `augment.evaluation`; it takes images to which this has been applied.

    Raises:
      UserError: for a network of features.
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
    """Loads what `export_stablehlo` wrote. The file is all that is needed, for the weights are in it.

    Raises:
      UserError: where the folder has no such file, and where this version of jax cannot read it.
    """
    folder = epath.Path(folder)
    if not (folder / STABLEHLO).exists():
        raise UserError(f"{folder} has no {STABLEHLO}, expected what ieg_jax.export wrote with --format=stablehlo")
    signature = json.loads((folder / SIGNATURE).read_text())
    try:
        exported = jax.export.deserialize(bytearray((folder / STABLEHLO).read_bytes()))
    except Exception as error:  # a file that is damaged, or too old or too new, makes jax raise errors of any kind
        raise UserError(
            f"{folder / STABLEHLO} cannot be read by jax {jax.__version__} ({first_line(error)}); it was written by "
            f"jax {signature['versions']['jax']}: export it anew"
        ) from None
    return Served(jax.jit(exported.call), signature)


def export_saved_model(trained: Trained, folder: epath.Path, dtype: str = "uint8") -> None:
    """Writes the prediction as a SavedModel, which TensorFlow and its servers run without jax.

    Args:
      trained: from `load`.
      folder: is made. It gets `signature.json` and the SavedModel, whose signature `serving_default` maps `image` to
        `probabilities`.
      dtype: as for `export_stablehlo`.

    Raises:
      UserError: for a network of features, and where this version of TensorFlow is too old for this version of jax. In
        both cases nothing is written.
    """
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
    except tf.errors.OpError as error:  # the program has operations that this version of TensorFlow does not know
        raise UserError(
            f"TensorFlow {tf.__version__} cannot run what jax {jax.__version__} makes for it: "
            f"{error.message.splitlines()[0][:200]}; take --format=stablehlo, or versions of the same age (jax 0.10.2 "
            f"and TensorFlow 2.21.0 go together)"
        ) from None
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    _write_signature(trained, folder, dtype, shape, {"format": "saved_model", "platforms": list(PLATFORMS)})


def load_saved_model(folder: epath.PathLike) -> Served:
    """Loads what `export_saved_model` wrote; TensorFlow runs it."""
    folder = epath.Path(folder)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    signature = json.loads((folder / SIGNATURE).read_text())
    return Served(lambda images: serve(image=tf.constant(images))["probabilities"].numpy(), signature)


def largest_difference(trained: Trained, served: Served, count: int = 3) -> float:
    """Returns the largest difference of the probabilities of a network and of the function made from it.

    Args:
      trained: the network.
      served: the function.
      count: on how many random images they are compared.
    """
    _, *shape = served.signature["input"]["shape"]
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)
    given = pixels if served.signature["input"]["dtype"] == "uint8" else pixels / np.float32(255)
    if trained.features is None:
        inputs = pixels / np.float32(127.5) - 1
    else:
        inputs = trained.features.of(make_split(pixels, np.zeros(count))).images
    expected = jax.jit(trained.probabilities)(*jax.device_get(trained.arrays), inputs)
    return float(np.abs(served(given) - np.asarray(expected, np.float32)).max())


def _served(trained: Trained, dtype: str) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, int, int]]:
    """Returns the function images `[n, H, W, C]` of `dtype` -> probabilities `[n, K]` float32, and (H, W, C).

    Raises:
      UserError: for a network of features, because the mean and deviation of features are not part of the weights.
    """
    data = trained.config.data
    if data.name == "features":
        raise UserError("a network of features is exported with --format=weights alone; ieg_jax.predict takes these")
    # The constants of the function must be numpy arrays, for arrays of jax would tie it to the devices that are here.
    arrays = jax.device_get(trained.arrays)
    if features := trained.features:
        weights = features.backbone.variables
        return (
            lambda image: trained.probabilities(*arrays, features.apply(weights, image)).astype(jnp.float32),
            (features.backbone.size, features.backbone.size, 3),
        )

    def served(image: jax.Array) -> jax.Array:
        image = image.astype(jnp.float32)
        image = image / 127.5 - 1.0 if dtype == "uint8" else image * 2.0 - 1.0  # as `data.images.to_float` does
        return trained.probabilities(*arrays, image).astype(jnp.float32)

    return served, trained.image_shape


def _write_signature(
    trained: Trained, folder: epath.Path, dtype: str, shape: tuple[int, int, int], more: dict[str, Any]
) -> None:
    """Writes `signature.json`; `more` has the format of the function and its platforms."""
    versions = provenance()["versions"]
    about = {
        **more,
        "input": {"name": "image", "shape": ["n", *shape], "dtype": dtype, "range": INPUTS[dtype]},
        "preprocessing": {
            "image_size": shape[0] if trained.features else trained.config.data.image_size,
            "evaluation": trained.config.augment.evaluation,
        },
        "output": {"name": "probabilities", "shape": ["n", trained.num_classes], "dtype": "float32"},
        "class_names": list(trained.class_names),
        "model": trained.config.model.name,
        "step": trained.step,
        "versions": {name: versions[name] for name in ("ieg_jax", "jax", "tensorflow")},
    }
    files.write_json(folder / SIGNATURE, about)
