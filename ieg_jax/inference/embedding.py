"""Features of images by a pretrained network, as a table to train on (`data.sources.feature_tables`)."""

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from pyarrow import parquet
from rich.progress import track

from ieg_jax import files, models
from ieg_jax.data import images
from ieg_jax.data.images import FileImages
from ieg_jax.data.sources import load as sources
from ieg_jax.data.splits import UNKNOWN, Source, Split, make_split
from ieg_jax.errors import StorageError, UserError
from ieg_jax.methods.base import inputs_of_head
from ieg_jax.models import pretrained

AT_ONCE = 2048  # images whose features are saved before the next are begun
NUM_CLASSES = 2  # of the head, which is not used


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A network that turns images into features.

    Attributes:
      about: what decides its features: the names of network and conventions, the hash of the weights, the size.
      features: images `[n, H, W, 1 or 3]`, uint8 or floats in [0, 1], n at most `batch` -> `[n, D]` float32.
      batch: images at once.
    """

    about: Mapping[str, str | int]
    features: Callable[[np.ndarray], np.ndarray]
    batch: int


def load_backbone(model: ConfigDict, size: int, batch: int) -> Backbone:
    """Loads a network with its weights.

    Args:
      model: the group `model` of the configuration: name, conventions, pretrained and dtype.
      size: pixels of a side to which images are resized (bilinear, with antialiasing) before they go in.
      batch: images at once.

    Raises:
      UserError: for a network or weights that cannot be used.
    """
    models.validate(model)
    file = pretrained.read(model)
    if file is None:
        raise UserError("model.pretrained is not set: features of random weights say nothing; name a file of weights")
    network = models.create(model, NUM_CLASSES)
    shape = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda key, x: network.init(key, x, train=True), rng, shape)
    arrays = pretrained.fit(file, model, shapes).arrays
    head = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in flatten_dict(dict(shapes), sep="/").items()
        if path not in arrays
    }
    variables = jax.device_put(unflatten_dict(arrays | head, sep="/"))

    @jax.jit
    def features(variables, pixels):
        scaled = pixels / 127.5 - 1 if pixels.dtype == np.uint8 else pixels * 2 - 1
        scaled = scaled.astype(np.float32)
        resized = jax.image.resize(scaled, (len(scaled), size, size, scaled.shape[-1]), "bilinear")
        if resized.shape[-1] == 1:
            resized = resized.repeat(3, -1)
        return inputs_of_head(network, variables, resized).astype(np.float32)

    def padded(pixels: np.ndarray) -> np.ndarray:
        missing = batch - len(pixels)  # one shape, so that it is compiled once
        whole = np.concatenate([pixels, np.repeat(pixels[:1], missing, 0)]) if missing else pixels
        return np.asarray(features(variables, whole))[: len(pixels)]

    about = {"network": model.name, "conventions": model.conventions, "weights": file.sha256, "size": size}
    return Backbone(about, padded, batch)


def embed(source: Source, out: pathlib.Path, backbone: Backbone, half: bool) -> int:
    """Writes a table of features of all images of a source, with what is known of them. Goes on where it was stopped.

    Args:
      source: its labels are written as they are; of a split without any (all UNKNOWN) there is no column.
      out: new .parquet file. Until it is complete there is a folder beside it, with the name and `.parts`.
      backbone: makes the features.
      half: whether they are stored as float16.

    Returns:
      How many images there are.

    Raises:
      UserError: for an image that cannot be decoded, and where the folder holds parts of something else.
      StorageError: where something cannot be written.
    """
    splits = {name: getattr(source, name) for name in ("train", "test", "trusted")}
    splits = {name: split for name, split in splits.items() if split is not None}
    parts = out.with_name(f"{out.name}.parts")
    _begin(parts, backbone, splits)
    chunks = [(name, start) for name, split in splits.items() for start in range(0, len(split), AT_ONCE)]
    found: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    for name, start in track(chunks, "embedding", disable=len(chunks) < 2):
        place = parts / f"{name}_{start:09d}.npz"
        if not place.exists():
            rows = np.arange(start, min(start + AT_ONCE, len(splits[name])))
            files.write_arrays(place, {"features": _features(splits[name].take(rows), backbone)}, compressed=False)
        with np.load(place, allow_pickle=False) as content:
            found[name].append(content["features"].astype(np.float16 if half else np.float32))
    table = pa.concat_tables(
        [_table(name, split, np.concatenate(found[name]), source.class_names) for name, split in splits.items()],
        promote_options="default",
    )
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"ieg_jax": json.dumps(dict(backbone.about))}), buffer)
    files.write(out, buffer.getvalue())
    shutil.rmtree(parts)
    return table.num_rows


def unlabelled(paths: Sequence[str]) -> Source:
    """Image files of which nothing is known, checked.

    Raises:
      UserError: for files that cannot be decoded.
    """
    names = np.array(paths, object)
    split = make_split(FileImages(names), np.full(len(names), UNKNOWN), names=names)
    data = ConfigDict({"unreadable": "refuse"})
    split, _ = sources.check_images(split, data)
    return Source("images", 0, split)


def _features(split: Split, backbone: Backbone) -> np.ndarray:
    """`[n, D]` float32."""
    pixels = split.images
    if not split.in_memory:
        pixels = images.load_resized(split.images, int(backbone.about["size"]), split.names, "bilinear")
    starts = range(0, len(split), backbone.batch)
    return np.concatenate([backbone.features(pixels[start : start + backbone.batch]) for start in starts])


def _begin(parts: pathlib.Path, backbone: Backbone, splits: Mapping[str, Split]) -> None:
    """Makes the folder of the parts, or sees that it holds those of the same images by the same network."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update("\n".join([name, *split.names]).encode("utf-8", "surrogateescape"))
        digest.update(split.images.tobytes() if split.in_memory else b"files")
    about = {**backbone.about, "images": digest.hexdigest()}
    file = parts / "about.json"
    if file.exists():
        there = json.loads(file.read_text())
        if there != about:
            changed = [key for key in about if there.get(key) != about[key]]
            raise UserError(
                f"{parts} holds parts of another table ({', '.join(changed)} differ); remove it, or name another --out"
            )
        return
    try:
        parts.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{parts} cannot be written: {error.strerror}") from error
    files.write_json(file, about)


def _table(name: str, split: Split, features: np.ndarray, class_names: Sequence[str]) -> pa.Table:
    names = [str(text).encode("utf-8", "replace").decode() for text in split.names]
    columns = {"id": names, "split": [name] * len(split)}
    if isinstance(split.images, FileImages):
        columns["path"] = [str(pathlib.Path(path).expanduser().absolute()) for path in split.images.paths]
    for column in ("label", "clean_label", "given_label"):
        labels = getattr(split, f"{column}s")
        if (labels >= 0).any():
            names = class_names or tuple(map(str, range(int(labels.max()) + 1)))
            columns[column] = [names[label] if label >= 0 else None for label in labels]
    kind = pa.float16() if features.dtype == np.float16 else pa.float32()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), kind), features.shape[1])
    return pa.table(columns).append_column("features", vectors)
