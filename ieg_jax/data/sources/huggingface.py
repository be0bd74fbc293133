"""Reads what Hugging Face `datasets` wrote with `save_to_disk`, with pyarrow alone.

The folder of a `Dataset` holds `dataset_info.json` (the features, that is the meaning of each column), `state.json`
(the names of the data files) and the data files, Arrow streams, which are mapped into memory: an image is read when
it is needed. The folder of a `DatasetDict` holds `dataset_dict.json` and such a folder for each split.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from ieg_jax import files
from ieg_jax.data import images
from ieg_jax.data.sources import records
from ieg_jax.data.sources.lists import numbered_classes
from ieg_jax.data.splits import UNKNOWN, Source, Split, make_split
from ieg_jax.errors import UserError
from ieg_jax.lazy import tf

CLEAN_LABEL = "clean_label"


@dataclasses.dataclass(frozen=True)
class ArrowImages(images.StoredImages):
    """Encoded images in a column of Arrow files.

    Attributes:
      column: structs of `bytes`, the encoded image, and `path`, its file where `bytes` is null.
      files: the Arrow files; the outcome of `check` is kept under their sizes and times.
      rows: `[n]` int64, places in the column.
      plain, sizes: `[n]` bool and `[n, 2]` int32, see `images.FileImages`; None = the images have not been checked.
    """

    column: pa.ChunkedArray
    files: tuple[str, ...]
    rows: np.ndarray
    plain: np.ndarray | None = None
    sizes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray) -> ArrowImages:
        columns = (self.rows, self.plain, self.sizes)
        return ArrowImages(self.column, self.files, *(None if part is None else part[rows] for part in columns))

    def reader(self) -> Callable[[tf.Tensor], images.Encoded]:
        """A function row -> Encoded."""
        rows, plain = tf.constant(self.rows), tf.constant(self.plain, tf.bool)

        def content(row):
            return self.content(int(row))

        def read(row):
            encoded = tf.numpy_function(content, [rows[row]], tf.string, stateful=False)
            return images.Encoded(tf.ensure_shape(encoded, []), plain[row])

        return read

    def content(self, row: int) -> bytes:
        """The encoded image at a place of the column; empty where there is none.

        Raises:
          OSError: where the image has a file of its own that cannot be read.
        """
        image = self.column[row].as_py() or {}
        if image.get("bytes") is None and image.get("path"):
            return pathlib.Path(image["path"]).read_bytes()
        return image.get("bytes") or b""


def check(stored: ArrowImages) -> list[images.Checked]:
    """Decodes every image once and remembers the outcome, as `images.check` does; returns `[n]`, in order."""
    about = repr([(file, images.stat(file)) for file in stored.files])
    key = hashlib.sha256(about.encode() + stored.rows.tobytes()).hexdigest()
    cached = images.cache_folder() / "checked" / f"{key}.npz"
    names = [field.name for field in dataclasses.fields(images.Checked)]
    table = records.read_table(cached)
    if table.keys() != set(names):

        def check_row(row: int) -> images.Checked:
            try:
                return images.check_image(stored.content(row))
            except OSError as error:
                return images.Checked(error=f"cannot be read: {error.strerror}")

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(check_row, stored.rows.tolist()))
        table = {name: np.array([getattr(result, name) for result in results]) for name in names}
        cached.parent.mkdir(parents=True, exist_ok=True)
        files.write_arrays(cached, table)
    return [images.Checked(*row) for row in zip(*(table[name].tolist() for name in names), strict=True)]


def huggingface(data: ConfigDict) -> Source:
    """A `Dataset` or `DatasetDict` in `data.dir`, as its `save_to_disk` wrote it.

    A `Dataset` is the training set; of a `DatasetDict` the splits `train`, `test` (or `validation`) and `trusted` are
    read. `data.test` and `data.trusted` name folders of further `Dataset`s. The images are the column of type `Image`,
    the labels that of type `ClassLabel`, or the one called `label`; `data.variant` names another column of labels.
    Labels are those of a `ClassLabel`, or strings, which are put in alphabetical order, or whole numbers (see
    `lists.numbered_classes`). In the training set a column `clean_label` is for diagnostics; in the other splits it is
    the label. A split for testing without any label, as benchmarks keep theirs back, is left out with a notice.

    Raises:
      UserError: for a folder without such data, files that cannot be read, and columns of other types.
    """
    folder = pathlib.Path(data.dir).expanduser()
    places = _places(data, folder)
    parts = {split: _read(place, data.variant) for split, place in places.items()}
    notices, train = [], parts["train"]
    if "test" in parts and all(np.all(column.numbers < 0) for column in parts["test"].columns):
        del parts["test"]
        notices.append(f"{places['test']}: none of the examples for testing has a label, so they are not used")
    classes = train.label.names
    if not classes:
        occurring = set(np.concatenate([column.numbers for column in train.columns]).tolist())
        try:
            classes = tuple(
                map(str, numbered_classes({number for number in occurring if number >= 0}, data.num_classes))
            )
        except UserError as error:
            raise UserError(f"{train.folder}: {error}") from None
    if len(classes) < 2:
        raise UserError(f"{places['train']}: all labels are the same, expected at least two classes")
    splits = {split: _to_split(split, part, classes) for split, part in parts.items()}
    return Source(folder.name, len(classes), **splits, class_names=classes, notices=tuple(notices))


@dataclasses.dataclass(frozen=True)
class _Labels:
    """A column of labels."""

    numbers: np.ndarray  # [n] int64, places in `names`; UNKNOWN where there is no label
    names: tuple[str, ...]  # of the classes; () where they have no names but their numbers


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is read of one `Dataset`."""

    folder: pathlib.Path
    images: ArrowImages
    label: _Labels
    clean_label: _Labels | None

    @property
    def columns(self) -> tuple[_Labels, ...]:
        """The columns of labels that there are."""
        return (self.label,) if self.clean_label is None else (self.label, self.clean_label)


def _places(data: ConfigDict, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split."""
    if data.dir and (folder / "dataset_dict.json").is_file():
        found = {name: folder / name for name in _json(folder / "dataset_dict.json", "splits")}
        if "train" not in found:
            raise UserError(
                f"data.dir={data.dir!r}: a DatasetDict with {sorted(found)}, expected a split train; name the folder "
                f"of the split to train on in data.dir, and those of others in data.test and data.trusted"
            )
    elif data.dir and (folder / "state.json").is_file():
        found = {"train": folder}
    else:
        raise UserError(
            f"data.dir={data.dir!r} holds no data set of Hugging Face (neither dataset_dict.json nor state.json); "
            f"write one there with save_to_disk of a Dataset or DatasetDict"
        )
    if "validation" in found:
        found.setdefault("test", found["validation"])
    for split in ("test", "trusted"):
        if data[split]:
            found[split] = pathlib.Path(data[split]).expanduser()
    return {split: found[split] for split in ("train", "test", "trusted") if split in found}


def _read(folder: pathlib.Path, label: str) -> _Part:
    names = [file["filename"] for file in _json(folder / "state.json", "_data_files")]
    if outside := [name for name in names if pathlib.PurePath(name).name != name]:
        raise UserError(f"{folder / 'state.json'}: data file {outside[0]!r}, expected the name of a file in {folder}")
    paths = [str(folder / name) for name in names]
    try:
        table = pa.concat_tables([pa.ipc.open_stream(pa.memory_map(path)).read_all() for path in paths])
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder}: its data files cannot be read ({error}); is the copy complete?") from None
    if not len(table):
        raise UserError(f"{folder}: no rows")
    features = _json(folder / "dataset_info.json", "features") or _features_of(table.schema)
    kinds = {name: features.get(name, {}).get("_type", "") for name in table.column_names}
    columns = ", ".join(f"{name} ({kind or table.schema.field(name).type})" for name, kind in kinds.items())

    def choose(kind: str, usual: str, wanted: str, advice: str) -> str:
        """The column that is wanted by name, else the only one of a kind, else the one with the usual name."""
        of_kind = [name for name in kinds if kinds[name] == kind and name != CLEAN_LABEL]
        chosen = wanted or (of_kind[0] if len(of_kind) == 1 else usual)
        if chosen not in kinds:
            raise UserError(f"{folder}: columns {columns}; expected {chosen!r}, {advice}")
        return chosen

    image = choose("Image", "image", "", "or one column of type Image")
    if kinds[image] != "Image" or not pa.types.is_struct(table.schema.field(image).type):
        raise UserError(f"{folder}: columns {columns}; expected {image!r} to be of type Image")
    name = choose("ClassLabel", "label", label, "or the name of the column with the labels in data.variant")
    stored = ArrowImages(table.column(image), tuple(paths), np.arange(len(table)))
    clean = _labels(table, features, CLEAN_LABEL, folder) if CLEAN_LABEL in kinds and name != CLEAN_LABEL else None
    return _Part(folder, stored, _labels(table, features, name, folder), clean)


def _labels(table: pa.Table, features: dict[str, Any], name: str, folder: pathlib.Path) -> _Labels:
    column, kind = table.column(name), table.schema.field(name).type
    values = column.to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        names = tuple(sorted({value for value in values if value}))
        numbers = {value: number for number, value in enumerate(names)}
        return _Labels(np.array([numbers.get(value, UNKNOWN) for value in values]), names)
    if not pa.types.is_integer(kind):
        raise UserError(f"{folder}: column {name!r} is of type {kind}, expected a ClassLabel, strings or whole numbers")
    numbers = np.array([UNKNOWN if value is None else value for value in values], np.int64)
    return _Labels(numbers, tuple(features.get(name, {}).get("names") or ()))


def _to_split(split: str, part: _Part, classes: tuple[str, ...]) -> Split:
    labels, clean = _renumbered(part.label, classes, part.folder), None
    if part.clean_label is not None:
        clean = _renumbered(part.clean_label, classes, part.folder)
    if split != "train":  # labels for testing, and trusted ones, are taken to be true
        labels = clean = labels if clean is None else np.where(clean == UNKNOWN, labels, clean)
    missing = np.flatnonzero(labels == UNKNOWN)
    if len(missing):
        raise UserError(
            f"{part.folder}: {len(missing):,} of {len(labels):,} examples have no label, or one below 0, the first in "
            f"row {missing[0]}; take them out (filter of the Dataset, then save_to_disk), or name another folder"
        )
    return make_split(part.images, labels, clean, [f"{split}/{row}" for row in range(len(labels))])


def _renumbered(labels: _Labels, classes: tuple[str, ...], folder: pathlib.Path) -> np.ndarray:
    """The labels as numbers of the classes of the training set, whose names may have another order; or UNKNOWN."""
    places = {name: number for number, name in enumerate(classes)}
    found, inverse = np.unique(labels.numbers, return_inverse=True)
    names = [labels.names[number] if 0 <= number < len(labels.names) else str(number) for number in found]
    strange = [name for name, number in zip(names, found, strict=True) if number >= 0 and name not in places]
    if strange:
        known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        raise UserError(f"{folder}: label {strange[0]!r} is none of the classes of the training set ({known})")
    table = [places[name] if number >= 0 else UNKNOWN for name, number in zip(names, found, strict=True)]
    return np.array(table)[inverse]


def _features_of(schema: pa.Schema) -> dict[str, Any]:
    """The features as the schema of the Arrow files has them, where dataset_info.json lacks them."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return about.get("info", {}).get("features") or {}


def _json(file: pathlib.Path, key: str) -> Any:
    """What a JSON file holds under a key; an empty list where it holds nothing."""
    try:
        return json.loads(file.read_text("utf-8")).get(key) or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); is the copy complete?") from None
