"""Predicts for image files, folders, lists and arrays, and writes a table."""

import contextlib
import csv
import dataclasses
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath
from ml_collections import ConfigDict
from pyarrow import parquet
from rich.progress import track

from ieg_jax import files
from ieg_jax.data import images
from ieg_jax.data.batches import image_shape
from ieg_jax.data.sources import feature_tables, image_files, lists
from ieg_jax.data.sources import load as sources
from ieg_jax.data.sources.arrays import read_features
from ieg_jax.data.splits import check_images_and_labels, distinct, in_lines, make_split
from ieg_jax.errors import StorageError, UserError, first_line
from ieg_jax.inference import plain
from ieg_jax.inference.trained import load, predictor

ENDINGS = (".csv", ".parquet")  # how the name of a table may end
LISTS, ARRAYS = (".csv", ".parquet", ".pq"), (".npy", ".npz")  # how the names of lists and arrays end
AT_ONCE = 512  # about so many images are decoded and predicted before their rows are written


@dataclasses.dataclass(frozen=True)
class Input:
    """The images of one argument of the command.

    Attributes:
      path: path of the array; "" for image files.
      paths: path of each image file; empty for an array.
      images: for an array uint8 or float32 `[n, H, W, C]`, or features `[n, 1, 1, D]`; None for image files, and for
        features that have not been read yet.
    """

    path: str
    paths: Sequence[str] = ()
    images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths) if self.images is None else len(self.images)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of the table.

    Attributes:
      paths: `[n]`, path of the image file, or of the array that the image is in.
      indices: `[n]`, place in that array; None for image files.
      probabilities: `[n, K]` float32; nan where there is an error.
      errors: `[n]`, why the image cannot be read; "" = it can.
    """

    paths: Sequence[str]
    indices: Sequence[int | None]
    probabilities: np.ndarray
    errors: Sequence[str]


def predict(
    workdir: str,
    arguments: Sequence[str],
    out: str,
    checkpoint: int | str | None = None,
    probabilities: bool = False,
    unreadable: str = "skip",
    classifier: str = "",
    spreadsheet: bool = False,
) -> str:
    """Writes a table of predictions, unless there is an error.

    Images that cannot be read have no prediction; some of them are also named on standard error.

    Args:
      workdir: the work folder of a run, or a folder with exported weights.
      arguments: the arguments of `ieg_jax.predict`: image files, folders, lists and arrays.
      out: new file, .csv or .parquet.
      checkpoint: the argument `step` of `trained.load`.
      probabilities: whether each class gets a column.
      unreadable: see `predictions`.
      classifier: classifier.joblib of an audit of the run, which predicts in place of the network; "" = none.
      spreadsheet: whether cells of a .csv table that a spreadsheet would take for formulas get a ' in front.

    Returns:
      A line that says what was written.

    Raises:
      UserError: before the first prediction, for arguments that cannot be predicted and a table that cannot be written;
        and where no image can be read.
      StorageError: where there is no room for the table.
    """
    table_path, places = _check_out(out), existing(arguments)
    trained = load(workdir, checkpoint)
    is_features = trained.config.data.name == "features"
    if classifier and not is_features and trained.features is None:
        raise UserError(f"--classifier={classifier}: the run is one on {trained.config.data.name}, expected features")
    by, instead = plain.load(classifier, trained.num_classes) if classifier else ("", None)
    if classifier and trained.features is not None:
        of_features = instead
        instead = lambda split: of_features(trained.features.of(split))  # noqa: E731
    inputs = find_inputs(places, is_features)
    count, bad = 0, []
    with PredictionFile(table_path, trained.class_names, inputs, probabilities, spreadsheet) as table:
        for rows in predictions(trained, inputs, unreadable, instead):
            table.write(rows)
            count += len(rows.paths)
            bad += [f"{path}: {error}" for path, error in zip(rows.paths, rows.errors, strict=True) if error]
        if len(bad) == count:
            raise UserError(f"none of the {count} images can be read:\n{in_lines(bad)}")
    if bad:
        print(f"{len(bad)} of {count} images cannot be read:\n{in_lines(bad)}", file=sys.stderr)
    besides = f", {len(bad)} of them without a prediction (column error)" if bad else ""
    return f"{count:,} images in {table_path}{besides}; {by or f'{trained.config.model.name} of step {trained.step}'}"


def find_inputs(places: Sequence[epath.Path], is_features: bool = False) -> list[Input]:
    """Finds what there is to predict. Image files are listed but not opened; arrays are read and checked.

    Args:
      places: image files, folders, lists and arrays, which exist.
      is_features: whether the network takes features. Their arrays are read later, by `predictions`.

    Raises:
      UserError: for folders and lists without images, and for arrays that do not hold images.
    """
    found = []
    for place in places:
        suffix = place.suffix.lower()
        if is_features:
            endings = (".npz", *feature_tables.ENDINGS)
            if suffix not in endings:
                raise UserError(f"{place}: the network takes features, expected a file of them ({', '.join(endings)})")
            found.append(Input(str(place)))
        elif suffix in ARRAYS and place.is_file():
            found.append(Input(str(place), images=_read_array(place)))
        else:
            paths = _list_folder(place) if place.is_dir() else _read_list(place) if suffix in LISTS else [str(place)]
            found.append(Input("", paths))
    return found


def predictions(
    trained: Any, inputs: Sequence[Input], unreadable: str = "skip", instead: Callable | None = None
) -> Iterator[Rows]:
    """Predicts some hundred images at a time, in order.

    Args:
      trained: from `inference.load`.
      inputs: from `find_inputs`.
      unreadable: skip = the rows of images that cannot be read have an error; refuse = all images are decoded before
        the first prediction, and one that cannot be read is an error of the command.
      instead: of the network predicts this function, split -> probabilities.

    Yields:
      The rows of these images.

    Raises:
      UserError: before the first row, for arrays of another shape than that of the network, for files that cannot be
        brought to its shape, and, with refuse, for files that cannot be read.
    """
    if trained.config.data.name == "features":
        inputs = [
            dataclasses.replace(one, images=read_features(trained.config.data, one.path).images) for one in inputs
        ]
    trained = _configured(trained, inputs)
    paths = [path for one in inputs for path in one.paths]
    if paths and unreadable == "refuse":
        _refuse(paths)
    predict = instead or predictor(trained)
    step = trained.config.eval_batch_size * max(1, AT_ONCE // trained.config.eval_batch_size)
    chunks = [(one, start) for one in inputs for start in range(0, len(one), step)]
    for one, start in track(chunks, "predicting", transient=True, disable=sum(map(len, inputs)) < 1000):
        if one.images is None:
            yield _predict_files(predict, trained, one.paths[start : start + step], unreadable)
        else:
            yield _predict_array(predict, trained, one, start, step)


def _configured(trained: Any, inputs: Sequence[Input]) -> Any:
    """Returns the network with a configuration that fits the inputs.

    Raises:
      UserError: where the inputs do not fit the network.
    """
    config, shape = ConfigDict(trained.config.to_dict()), trained.image_shape
    # A batch that is larger than the number of images would mostly be padding.
    config.eval_batch_size = min(config.eval_batch_size, AT_ONCE, sum(map(len, inputs)))
    if trained.features is not None:  # its backbone takes images of any size
        return dataclasses.replace(trained, config=config)

    def made(size: tuple[int, int, int] | None) -> tuple[int, int, int]:
        """Returns the shape after resizing and `augment.evaluation`; None stands for image files of various sizes."""
        if config.data.image_size and config.data.name != "features":
            size = (config.data.image_size,) * 2 + (3 if size is None else size[-1],)
        return image_shape(config, "evaluation", size)

    for one in inputs:
        if one.images is not None:
            got = made(one.images.shape[1:])
            if got[:2] != shape[:2]:
                raise UserError(
                    f"{one.path}: images of {got[0]}×{got[1]} pixels, the network was trained on {shape[0]}×{shape[1]}"
                )
    if any(one.images is None for one in inputs):
        try:
            made(None)
        except UserError:  # all images of the run had the same size, so files of other sizes are resized to it
            if shape[0] != shape[1]:
                raise UserError(
                    f"the network was trained on arrays of {shape[0]}×{shape[1]} pixels, and image files are only made "
                    f"square; give the images as an array"
                ) from None
            config.data.image_size = shape[0]
    return dataclasses.replace(trained, config=config)


def _refuse(paths: Sequence[str]) -> None:
    """Decodes all images, and raises UserError where one cannot be read."""
    checked = images.check(np.array(paths, object))
    bad = [f"{path}: {one.error}" for path, one in zip(paths, checked, strict=True) if one.error]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read:\n{in_lines(bad)}\nmend or remove them, or leave "
            f"--unreadable at skip to have them named in the table"
        )


def _predict_array(predict: Callable, trained: Any, one: Input, start: int, count: int) -> Rows:
    """Predicts at most `count` images of an array, from the place `start`."""
    pixels = one.images[start : start + count]
    split = sources.resize(make_split(pixels, np.zeros(len(pixels))), trained.config.data.image_size)
    indices = range(start, start + len(pixels))
    return Rows([one.path] * len(pixels), indices, predict(split), [""] * len(pixels))


def _predict_files(predict: Callable, trained: Any, paths: Sequence[str], unreadable: str) -> Rows:
    """Predicts image files; those that cannot be read get an error."""
    names = np.array(paths, object)
    checked = images.check(names)
    errors = [one.error for one in checked]
    files = images.FileImages(
        names,
        np.array([one.plain for one in checked]),
        np.array([(one.height, one.width) for one in checked], np.int32),
    )
    size = trained.config.data.image_size
    probabilities = np.full((len(names), trained.num_classes), np.nan, np.float32)

    def fill(rows: np.ndarray) -> None:
        """Predicts these rows. If that fails, it tries each half of them, until only files that are to blame fail."""
        if not len(rows):
            return
        try:
            content = images.load_resized(files[rows], size, names[rows]) if size else files[rows]
            probabilities[rows] = predict(make_split(content, np.zeros(len(rows)), names=names[rows]))
        except UserError as error:  # a file has disappeared or changed since it was checked
            if unreadable == "refuse":
                raise
            if len(rows) == 1:
                errors[rows[0]] = str(error)
            else:
                fill(rows[: len(rows) // 2])
                fill(rows[len(rows) // 2 :])

    fill(np.flatnonzero([not error for error in errors]))
    return Rows(paths, [None] * len(paths), probabilities, errors)


class PredictionFile:
    """A table, .csv or .parquet, that has another name until it is complete. It is a context manager."""

    def __init__(
        self,
        out: epath.Path,
        class_names: Sequence[str],
        inputs: Sequence[Input],
        probabilities: bool,
        spreadsheet: bool = False,
    ):
        """Decides which columns there are; nothing is written before the context is entered.

        Args:
          out: the file, whose ending says the format.
          class_names: `[K]`.
          inputs: what is predicted.
          probabilities: whether each class gets a column.
          spreadsheet: see `predict`.
        """
        self._inert = files.inert if spreadsheet else lambda cell: cell
        self._out, self._names = out, tuple(class_names)
        self._columns = {"path": "string"}
        if any(one.path for one in inputs):
            self._columns["index"] = "int64"
        self._columns |= {"class": "string", "probability": "float32", "error": "string"}
        self._each = [f"probability:{name}" for name in distinct(self._names)]
        self._columns |= dict.fromkeys(self._each if probabilities else [], "float32")

    def __enter__(self) -> "PredictionFile":
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as resources:
                self._write = self._open(resources, resources.enter_context(files.complete_or_absent(self._out)))
                self._resources = resources.pop_all()
        except (*files.storage_errors(), StorageError) as error:
            raise UserError(f"--out={self._out} cannot be written: {first_line(error.__cause__ or error)}") from None
        return self

    def __exit__(self, *error) -> None:
        self._resources.__exit__(*error)

    def write(self, rows: Rows) -> None:
        """Adds rows.

        Raises:
          StorageError: where they cannot be written.
        """
        good = [not error for error in rows.errors]
        best = np.where(good, np.nan_to_num(rows.probabilities).argmax(-1), -1)
        columns = {
            "path": list(rows.paths),
            "index": list(rows.indices),
            "class": [self._names[label] if label >= 0 else None for label in best],
            "probability": [
                float(p[label]) if label >= 0 else None for p, label in zip(rows.probabilities, best, strict=True)
            ],
            "error": [error or None for error in rows.errors],
        }
        for number, name in enumerate(self._each):
            if name in self._columns:
                values = rows.probabilities[:, number].tolist()
                columns[name] = [value if fine else None for value, fine in zip(values, good, strict=True)]
        try:
            self._write({name: columns[name] for name in self._columns})
        except files.storage_errors() as error:
            raise StorageError(f"{self._out} cannot be written: {first_line(error)}") from error

    def _open(self, resources: contextlib.ExitStack, place: epath.Path) -> Callable[[dict[str, list]], None]:
        """Opens the file at `place`, and returns the function that writes to it: columns, by name."""
        if self._out.suffix.lower() == ".parquet":
            schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in self._columns.items()])
            writer = resources.enter_context(parquet.ParquetWriter(place, schema))
            # Texts in a .parquet file are UTF-8, and a path may have bytes that are not.
            return lambda columns: writer.write_table(
                pa.table({name: [_readable(cell) for cell in cells] for name, cells in columns.items()}, schema)
            )
        file = resources.enter_context(
            open(place, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
        )
        plain = csv.writer(file, lineterminator="\n")
        # A cell with \r needs quotes, which Python 3.11 only writes where it is told to.
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(self._columns)

        def write(columns: dict[str, list]) -> None:
            for row in zip(*columns.values(), strict=True):
                cells = [f"{cell:.6g}" if isinstance(cell, float) else self._inert(cell) for cell in row]
                writer = quoted if any(isinstance(cell, str) and "\r" in cell for cell in cells) else plain
                writer.writerow(cells)

        return write


def _readable(cell: Any) -> Any:
    """Replaces bytes of a text that are not UTF-8 by the sign for that; other values stay as they are."""
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(cell, str) else cell


def _check_out(out: str) -> epath.Path:
    """Returns the path of the table; raises UserError where the file exists, or where its ending names no format."""
    path = files.place(out)
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out={out}: expected a name that ends in {' or '.join(ENDINGS)}")
    if path.exists():
        raise UserError(f"--out={out} is there already; name a new file")
    return path


def existing(arguments: Sequence[str]) -> list[epath.Path]:
    """Returns the paths that the command names; raises UserError where there is none, or where one does not exist."""
    if not arguments:
        raise UserError("nothing to predict; name image files, folders, lists (.csv, .parquet) or arrays (.npy, .npz)")
    places = [files.place(argument) for argument in arguments]
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
    return places


def _list_folder(folder: epath.Path) -> list[str]:
    """Returns the paths of the images in a folder and its subfolders."""
    paths = [str(path) for path in image_files.images_below(folder)]
    if not paths:
        raise UserError(f"{folder}: no images in it (files ending in {', '.join(sorted(image_files.SUFFIXES))})")
    return paths


def _read_list(file: epath.Path) -> list[str]:
    """Returns the paths in a list; the list has them relative to itself."""
    cells = [(row["path"] or "").strip() for _, row in lists.list_rows(file, ["path"])]
    paths = [str(file.parent / cell) for cell in cells if cell]
    if not paths:
        raise UserError(f"{file}: no images listed")
    return paths


def _read_array(file: epath.Path) -> np.ndarray:
    """Reads images `[n, H, W, C]`, C = 1 or 3, uint8 or floats in [0, 1], from an .npy or .npz file.

    Of an .npz file it takes the only array, or the array `images`.
    """
    try:
        content = np.load(files.opened(file), allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            with content:
                name = "images" if len(content.files) != 1 else content.files[0]
                if name not in content.files:
                    raise UserError(f"{file}: has {sorted(content.files)}, expected the array images")
                content = content[name]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read as {file.suffix} ({first_line(error)})") from None
    content = content[..., None] if content.ndim == 3 else content
    check_images_and_labels(content, np.zeros(len(content) if content.ndim else 0, np.int32), str(file), 0)
    return content
