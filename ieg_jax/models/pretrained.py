"""Weights that a run starts from, read from a file: published ones of ResNet-50, or those of another run.

`model.pretrained` is a .safetensors or .npz file of named arrays, in one of these layouts:

- what `python -m ieg_jax.export` writes, for any network: `params/head/kernel`;
- torchvision's and timm's resnet50: `layer1.0.conv1.weight`;
- transformers' ResNet-50: `resnet.encoder.stages.0.layers.0.layer.0.convolution.weight`;
- ResNet50 of Flax's ImageNet example: `params/BottleneckResNetBlock_0/Conv_0/kernel`.

Every array must be there, none may be left over, and shapes must be those of the network. Only the head starts afresh
where the file has none, or one for another number of classes. What the last three expect of images and padding is said
with `model.conventions` (`resnet50.py`), torch or, for the last, flax; with another the file is refused.

PyTorch's own files are pickles, which can run any code when they are opened, and are not opened.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ieg_jax import inference, models
from ieg_jax.errors import UserError, first_line
from ieg_jax.models import resnet50

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
KERNEL, BIAS = "params/head/kernel", "params/head/bias"


@dataclasses.dataclass(frozen=True)
class File:
    """A file of named arrays as it was read."""

    path: str
    arrays: dict[str, np.ndarray]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays as the network has them, by a path such as `params/head/kernel`, and a line that says what they are."""

    arrays: dict[str, np.ndarray]
    note: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kind of file names and shapes its arrays.

    Attributes:
      title: of the kind.
      name: path of an array here -> its name in the file.
      conventions: the value of `model.conventions` that the weights need; "" = that of the run they are of.
    """

    title: str
    name: Callable[[str], str]
    conventions: str = ""

    def turn(self, array: np.ndarray) -> np.ndarray:
        """An array of the file with the axes that it has here: torch's are `[out, in, h, w]` and `[out, in]`."""
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim) if self.conventions == "torch" else None
        return array.transpose(axes) if axes else array


def _published(modules: dict[str, str], torch: bool) -> Callable[[str], str]:
    """The names of a published ResNet-50.

    Args:
      modules: kind of layer here -> its module there, a format of `stage` and `layer` (from 1; `stage0` and `layer0`
        from 0), `block` of the stage and `number` of the block among all (from 0).
      torch: names end as PyTorch's do.
    """

    def name(path: str) -> str:
        pattern = r"(params|batch_stats)/(?:stage(\d)_block(\d)/)?(head|(?:init_|shortcut_)?(?:conv|norm))(\d?)/(\w+)"
        collection, stage, block, kind, layer, leaf = re.fullmatch(pattern, path).groups()
        stage, block, layer = int(stage or 1), int(block or 0), int(layer or 1)
        number = sum(resnet50.BLOCKS[: stage - 1]) + block
        module = modules[kind].format(
            stage=stage, stage0=stage - 1, layer=layer, layer0=layer - 1, block=block, number=number
        )
        return f"{module}.{_TORCH_LEAVES[leaf]}" if torch else f"{collection}/{module}/{leaf}"

    return name


_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TORCHVISION = {
    "init_conv": "conv1",
    "init_norm": "bn1",
    "conv": "layer{stage}.{block}.conv{layer}",
    "norm": "layer{stage}.{block}.bn{layer}",
    "shortcut_conv": "layer{stage}.{block}.downsample.0",
    "shortcut_norm": "layer{stage}.{block}.downsample.1",
    "head": "fc",
}
_TRANSFORMERS = {
    "init_conv": "resnet.embedder.embedder.convolution",
    "init_norm": "resnet.embedder.embedder.normalization",
    "conv": "resnet.encoder.stages.{stage0}.layers.{block}.layer.{layer0}.convolution",
    "norm": "resnet.encoder.stages.{stage0}.layers.{block}.layer.{layer0}.normalization",
    "shortcut_conv": "resnet.encoder.stages.{stage0}.layers.{block}.shortcut.convolution",
    "shortcut_norm": "resnet.encoder.stages.{stage0}.layers.{block}.shortcut.normalization",
    "head": "classifier.1",
}
_FLAX_EXAMPLE = {
    "init_conv": "conv_init",
    "init_norm": "bn_init",
    "conv": "BottleneckResNetBlock_{number}/Conv_{layer0}",
    "norm": "BottleneckResNetBlock_{number}/BatchNorm_{layer0}",
    "shortcut_conv": "BottleneckResNetBlock_{number}/conv_proj",
    "shortcut_norm": "BottleneckResNetBlock_{number}/norm_proj",
    "head": "Dense_0",
}
OWN = Layout("as ieg_jax.export writes them", lambda path: path)
PUBLISHED = (
    Layout("torchvision's names", _published(_TORCHVISION, torch=True), "torch"),
    Layout("transformers' names", _published(_TRANSFORMERS, torch=True), "torch"),
    Layout("the names of Flax's ImageNet example", _published(_FLAX_EXAMPLE, torch=False), "flax"),
)


def validate(model: ConfigDict) -> None:
    """Checks the name of the file.

    Args:
      model: the group `model` of the configuration.

    Raises:
      UserError: for a pickle and other files that are not read.
    """
    path = model.pretrained
    if path.endswith(PICKLES):
        target = path.rpartition(".")[0] + ".safetensors"
        raise UserError(
            f"model.pretrained: got {path}, a pickle, which can run any code when it is opened, and is not opened; "
            f'expected .safetensors or .npz. Convert a state dict where torch is installed: python -c "import torch, '
            f"safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), '{target}')\""
        )
    if path and not path.endswith((".safetensors", ".npz")):
        raise UserError(f"model.pretrained: got {path}, expected a .safetensors or .npz file, or '' for none")


def read(model: ConfigDict) -> File | None:
    """Reads the file that `model.pretrained` names; None where it names none.

    Args:
      model: the group `model` of the configuration.

    Raises:
      UserError: where it is missing or damaged. Nothing is unpickled.
    """
    path = model.pretrained
    if not path:
        return None
    try:
        content = epath.Path(path).read_bytes()
        if path.endswith(".npz"):
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = dict(archive)
        else:
            arrays = safetensors.numpy.load(content)
    except KeyError as error:  # of a type that numpy lacks
        raise UserError(
            f"model.pretrained: {path} has numbers of type {error}, expected float16, float32 or float64"
        ) from None
    except Exception as error:  # whatever the libraries meet in damaged files
        raise UserError(f"model.pretrained: {path} cannot be read: {first_line(error)}") from None
    return File(path, arrays, hashlib.sha256(content).hexdigest())


def fit(file: File | None, model: ConfigDict, state: Any) -> Weights:
    """The arrays of a file as the network has them.

    Args:
      file: from `read`; None has no arrays and no note.
      model: the group `model` of the configuration.
      state: a TrainState, or the shapes of one: `params` and `batch_stats`.

    Raises:
      UserError: where the file is of another network: its names, its shapes, or the images that it was trained on.
    """
    if file is None:
        return Weights({}, "")
    wanted = flatten_dict({"params": state.params, "batch_stats": state.batch_stats}, sep="/")
    layout, names = _recognize(file, model, wanted)
    if not layout.conventions:
        _check_network(file, model)
    elif layout.conventions != model.conventions:
        raise UserError(
            f"model.conventions: got {model.conventions!r}, expected {layout.conventions!r}: the images and padding "
            f"that the weights of model.pretrained={file.path} ({layout.title}) were trained with"
        )
    arrays = {path: layout.turn(file.arrays[name]) for path, name in names.items() if name in file.arrays}
    head = _fresh_head(arrays, wanted)
    if head:
        wanted = {path: leaf for path, leaf in wanted.items() if path not in (KERNEL, BIAS)}
    _check_arrays(file, model, layout, names, arrays, wanted)
    arrays = {path: arrays[path].astype(leaf.dtype) for path, leaf in wanted.items()}
    note = f"starts from {len(arrays)} arrays of {file.path} ({layout.title}, SHA-256 {file.sha256[:16]}…)"
    return Weights(arrays, f"{note}; {head}" if head else note)


def _recognize(file: File, model: ConfigDict, wanted: Iterable[str]) -> tuple[Layout, dict[str, str]]:
    """The layout that most names of the file belong to, and path -> name in it."""
    layouts = [OWN, *(PUBLISHED if model.name == "resnet50" else ())]
    candidates = [(layout, {path: layout.name(path) for path in wanted}) for layout in layouts]
    layout, names = max(candidates, key=lambda candidate: len(file.arrays.keys() & candidate[1].values()))
    if not file.arrays.keys() & names.values():
        known = ", ".join(layout.name(KERNEL) for layout in layouts)
        raise UserError(
            f"model.pretrained: {file.path} has arrays named {_some(file.arrays)}; expected names such as {known}, "
            f"the layouts that model.name={model.name} can be read from"
        )
    return layout, names


def _fresh_head(arrays: dict[str, np.ndarray], wanted: dict[str, Any]) -> str:
    """Why the head of the file is not used; "" where it is, or where it is wrong in another way."""
    kernel, bias = arrays.get(KERNEL), arrays.get(BIAS)
    if kernel is None and bias is None:
        return "it has no head, which starts afresh"
    inputs, num_classes = wanted[KERNEL].shape
    if kernel is None or bias is None or kernel.shape != (inputs, bias.size) or bias.size == num_classes:
        return ""
    return f"its head is for {bias.size} classes, this one for {num_classes} starts afresh"


def _check_network(file: File, model: ConfigDict) -> None:
    """Refuses weights of a run whose network had the same arrays and computed something else."""
    about = epath.Path(file.path).parent / inference.MODEL
    if not about.exists():
        return
    computed = {"dtype": model.dtype, "remat": model.remat, "pretrained": model.pretrained}
    theirs = {**model.to_dict(), **json.loads(about.read_text())["config"]["model"], **computed}
    if models.create(ConfigDict(theirs), num_classes=2) != models.create(model, num_classes=2):
        changed = [f"model.{key}={theirs[key]!r}, here {model[key]!r}" for key in model if theirs[key] != model[key]]
        raise UserError(f"model.pretrained: {file.path} was trained with {', '.join(changed)}; set the same")


def _check_arrays(
    file: File,
    model: ConfigDict,
    layout: Layout,
    names: dict[str, str],
    arrays: dict[str, np.ndarray],
    wanted: dict[str, jax.ShapeDtypeStruct],
) -> None:
    expected = {path: leaf.shape for path, leaf in wanted.items()}
    found = {path: array for path, array in arrays.items() if path in expected}
    counters = {name for name in file.arrays if layout.conventions == "torch" and name.endswith(".num_batches_tracked")}
    problems = {
        "missing": [names[path] for path in expected if path not in found],
        "not known": sorted(file.arrays.keys() - names.values() - counters),
        "of another shape": [
            f"{names[path]} with {array.shape} for {expected[path]}"
            for path, array in found.items()
            if array.shape != expected[path]
        ],
        "not of finite floating-point numbers": [
            names[path] for path, array in found.items() if array.dtype.kind != "f" or not np.isfinite(array).all()
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(those)} {what}: {_some(those)}" for what, those in problems.items() if those)
        raise UserError(
            f"model.pretrained: {file.path} ({layout.title}) does not have the arrays of model.name={model.name} with "
            f"model.width={model.width}: {told}"
        )


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
