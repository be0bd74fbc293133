"""Predicts the classes of images: `python -m ieg_jax.predict --workdir=run images/ more.csv --out=predictions.csv`.

The arguments are image files, folders (searched for images, with the folders in them), lists (.csv or .parquet with a
column `path`, relative to the list) and arrays (.npy, or .npz with `images`), in any number and order; for a network of
features, .npz files with `features`. Images are treated as those that accuracy was measured on: data.image_size and
augment.evaluation of the run. The averaged weights predict.

The table has a row for each image, in their order, with the columns

    path         the file; index, the place in an array, follows where there are arrays
    class        the name of the most probable class
    probability  its probability
    error        what is wrong with an image that cannot be read; class and probability of it are empty
    probability:NAME  with --probabilities: of each class
"""

import contextlib
import csv
import dataclasses
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from ieg_jax import cli
from ieg_jax.audit_page import distinct
from ieg_jax.errors import StorageError, UserError, first_line

ENDINGS = (".csv", ".parquet")  # of the table
LISTS, ARRAYS = (".csv", ".parquet", ".pq"), (".npy", ".npz")
AT_ONCE = 512  # images that are decoded and predicted before their rows are written


@dataclasses.dataclass(frozen=True)
class Input:
    """Images that are predicted in one go.

    Attributes:
      path: of the array, "" for image files.
      paths: of each image file; for an array the number of rows is that of `images`.
      images: uint8 or float32 `[n, H, W, C]`, or features `[n, 1, 1, D]`; None for image files.
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
      paths: `[n]`, of the image or of the array it is in.
      indices: `[n]` places in that array; None for image files.
      probabilities: `[n, K]` float32, nan where there is an error.
      errors: `[n]`, "" = none.
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
) -> str:
    """Writes a table of predictions; images that cannot be read are named on standard error too.

    Args:
      workdir: of a run, or exported weights.
      arguments: what to predict, see above.
      out: new file, .csv or .parquet.
      checkpoint: see `inference.load`.
      probabilities: a column for each class besides.
      unreadable: see `predictions`.

    Returns:
      A line that says what was written.

    Raises:
      UserError: for what cannot be predicted or written, before the first prediction; and where no image can be read.
      StorageError: where there is no room for the table. In either case there is none.
    """
    table_path, places = _check_out(out), _check_places(arguments)
    from ieg_jax import inference
    from ieg_jax.data.splits import in_lines

    trained = inference.load(workdir, checkpoint)
    inputs = find_inputs(places, trained.config.data.name == "features")
    count, bad = 0, []
    with Table(table_path, trained.class_names, inputs, probabilities) as table:
        for rows in predictions(trained, inputs, unreadable):
            table.write(rows)
            count += len(rows.paths)
            bad += [f"{path}: {error}" for path, error in zip(rows.paths, rows.errors, strict=True) if error]
        if len(bad) == count:
            raise UserError(f"none of the {count} images can be read:\n{in_lines(bad)}")
    if bad:
        print(f"{len(bad)} of {count} images cannot be read:\n{in_lines(bad)}", file=sys.stderr)
    besides = f", {len(bad)} of them without a prediction (column error)" if bad else ""
    return f"{count:,} images in {table_path}{besides}; {trained.config.model.name} of step {trained.step}"


def find_inputs(places: Sequence[pathlib.Path], is_features: bool = False) -> list[Input]:
    """What there is to predict; image files are listed, not opened, and arrays are read and checked.

    Args:
      places: image files, folders, lists and arrays, which exist.
      is_features: that the arrays are of features; they are not read here (see `predictions`).

    Raises:
      UserError: for folders and lists without images, and arrays that are no images.
    """
    found = []
    for place in places:
        suffix = place.suffix.lower()
        if is_features:
            if suffix != ".npz":
                raise UserError(f"{place}: the network takes features, expected an .npz file with `features` [n,D]")
            found.append(Input(str(place)))
        elif suffix in ARRAYS and place.is_file():
            found.append(Input(str(place), images=_read_array(place)))
        else:
            paths = _list_folder(place) if place.is_dir() else _read_list(place) if suffix in LISTS else [str(place)]
            found.append(Input("", paths))
    return found


def predictions(trained: Any, inputs: Sequence[Input], unreadable: str = "skip") -> Iterator[Rows]:
    """Predicts some hundred images after another, in order.

    Args:
      trained: from `inference.load`.
      inputs: from `find_inputs`.
      unreadable: skip = images that cannot be read get an error; refuse = all are decoded first.

    Yields:
      Their rows.

    Raises:
      UserError: before the first row, for arrays of a shape that the network was not trained on, files that cannot be
        brought to its shape, and, with refuse, files that cannot be read.
    """
    from rich.progress import track

    from ieg_jax import inference
    from ieg_jax.data import sources

    if trained.config.data.name == "features":
        inputs = [
            dataclasses.replace(one, images=sources.read_features(trained.config.data, one.path).images)
            for one in inputs
        ]
    trained = _configured(trained, inputs)
    files = [path for one in inputs for path in one.paths]
    if files and unreadable == "refuse":
        _refuse(files)
    predict = inference.predictor(trained)
    step = trained.config.eval_batch_size * max(1, AT_ONCE // trained.config.eval_batch_size)
    chunks = [(one, start) for one in inputs for start in range(0, len(one), step)]
    for one, start in track(chunks, "predicting", transient=True, disable=sum(map(len, inputs)) < 1000):
        if one.images is None:
            yield _predict_files(predict, trained, one.paths[start : start + step], unreadable)
        else:
            yield _predict_array(predict, trained, one, start, step)


def _configured(trained: Any, inputs: Sequence[Input]) -> Any:
    """The network with a configuration that fits the inputs.

    Raises:
      UserError: where they do not fit the network.
    """
    from ml_collections import ConfigDict

    from ieg_jax import inference
    from ieg_jax.data import pipeline

    config, shape = ConfigDict(trained.config.to_dict()), inference.image_shape(trained)
    # A batch no larger than what there is to predict: the rest would be padding.
    config.eval_batch_size = min(config.eval_batch_size, AT_ONCE, sum(map(len, inputs)))

    def made(size: tuple[int, int, int] | None) -> tuple[int, int, int]:
        if config.data.image_size and config.data.name != "features":
            size = (config.data.image_size,) * 2 + (3 if size is None else size[-1],)
        return pipeline.image_shape(config, "evaluation", size)

    for one in inputs:
        if one.images is not None:
            got = made(one.images.shape[1:])
            if shape and got[:2] != shape[:2]:
                raise UserError(
                    f"{one.path}: images of {got[0]}×{got[1]} pixels, the network was trained on {shape[0]}×{shape[1]}"
                )
    if any(one.images is None for one in inputs):
        try:
            made(None)
        except UserError:  # each file has a size of its own: the data set had one, so make it that
            if shape is None or shape[0] != shape[1]:
                known = f"{shape[0]}×{shape[1]} pixels" if shape else "a size that is not known any more"
                raise UserError(
                    f"the network was trained on arrays of {known}, and image files are only made square; give the "
                    f"images as an array"
                ) from None
            config.data.image_size = shape[0]
    return dataclasses.replace(trained, config=config)


def _refuse(paths: Sequence[str]) -> None:
    from ieg_jax.data import images
    from ieg_jax.data.splits import in_lines

    checked = images.check(np.array(paths, object))
    bad = [f"{path}: {one.error}" for path, one in zip(paths, checked, strict=True) if one.error]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read:\n{in_lines(bad)}\nmend or remove them, or leave "
            f"--unreadable at skip to have them named in the table"
        )


def _predict_array(predict: Callable, trained: Any, one: Input, start: int, count: int) -> Rows:
    from ieg_jax.data import sources
    from ieg_jax.data.splits import make_split

    pixels = one.images[start : start + count]
    split, _ = sources.open_images(make_split(pixels, np.zeros(len(pixels))), trained.config.data)
    indices = range(start, start + len(pixels))
    return Rows([one.path] * len(pixels), indices, predict(split), [""] * len(pixels))


def _predict_files(predict: Callable, trained: Any, paths: Sequence[str], unreadable: str) -> Rows:
    from ieg_jax.data import images
    from ieg_jax.data.splits import make_split

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
        if not len(rows):
            return
        try:
            content = images.load_resized(files[rows], size, names[rows]) if size else files[rows]
            probabilities[rows] = predict(make_split(content, np.zeros(len(rows)), names=names[rows]))
        except UserError as error:  # a file has gone or changed since it was checked: find it
            if unreadable == "refuse":
                raise
            if len(rows) == 1:
                errors[rows[0]] = str(error)
            else:
                fill(rows[: len(rows) // 2])
                fill(rows[len(rows) // 2 :])

    fill(np.flatnonzero([not error for error in errors]))
    return Rows(paths, [None] * len(paths), probabilities, errors)


class Table:
    """Writes rows as .csv or .parquet, under another name until it is complete; to be used as a context."""

    def __init__(self, out: pathlib.Path, class_names: Sequence[str], inputs: Sequence[Input], probabilities: bool):
        """Says which columns there are.

        Args:
          out: the file, whose ending says the format.
          class_names: `[K]`.
          inputs: what is predicted.
          probabilities: whether each class gets a column.
        """
        self._out, self._names = out, tuple(class_names)
        self._partial = out.with_name(f"{out.name}.partial")
        self._columns = {"path": "string"}
        if any(one.path for one in inputs):
            self._columns["index"] = "int64"
        self._columns |= {"class": "string", "probability": "float32", "error": "string"}
        self._each = [f"probability:{name}" for name in distinct(self._names)]
        self._columns |= dict.fromkeys(self._each if probabilities else [], "float32")

    def __enter__(self) -> "Table":
        self._resources = contextlib.ExitStack()
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise UserError(f"--out={self._out} cannot be written: {first_line(error)}") from None
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._resources.close()
            if kind is None:
                self._partial.rename(self._out)
        except OSError as problem:
            raise self._no_room(problem) from problem
        finally:
            self._partial.unlink(missing_ok=True)

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
        except OSError as error:
            raise self._no_room(error) from error

    def _open(self) -> None:
        if self._out.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet

            schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in self._columns.items()])
            writer = self._resources.enter_context(pyarrow.parquet.ParquetWriter(self._partial, schema))
            # Paths that are no UTF-8 cannot be told in full.
            self._write = lambda columns: writer.write_table(
                pa.table({name: [_readable(cell) for cell in cells] for name, cells in columns.items()}, schema)
            )
            return
        file = self._resources.enter_context(
            self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        )
        plain = csv.writer(file, lineterminator="\n")
        quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)  # Python 3.11 leaves \r without quotes
        plain.writerow(self._columns)

        def write(columns: dict[str, list]) -> None:
            for row in zip(*columns.values(), strict=True):
                cells = [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row]
                writer = quoted if any(isinstance(cell, str) and "\r" in cell for cell in cells) else plain
                writer.writerow(cells)

        self._write = write

    def _no_room(self, error: OSError) -> StorageError:
        return StorageError(f"{self._out} cannot be written: {first_line(error)}")


def _readable(cell: Any) -> Any:
    return cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(cell, str) else cell


def _check_out(out: str) -> pathlib.Path:
    """The path of the table; raises UserError where it is there already, or its ending names no format."""
    path = pathlib.Path(out).expanduser()
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--out={out}: expected a name that ends in {' or '.join(ENDINGS)}")
    if path.exists():
        raise UserError(f"--out={out} is there already; name a new file")
    return path


def _check_places(arguments: Sequence[str]) -> list[pathlib.Path]:
    """The paths that the command names; raises UserError where there is none, or one does not exist."""
    if not arguments:
        raise UserError("nothing to predict; name image files, folders, lists (.csv, .parquet) or arrays (.npy, .npz)")
    places = [pathlib.Path(argument).expanduser() for argument in arguments]
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
    return places


def _list_folder(folder: pathlib.Path) -> list[str]:
    from ieg_jax.data import image_files

    paths = [str(path) for path in image_files.images_below(folder, set())]
    if not paths:
        raise UserError(f"{folder}: no images in it (files ending in {', '.join(sorted(image_files.SUFFIXES))})")
    return paths


def _read_list(file: pathlib.Path) -> list[str]:
    """The paths in a list, relative to it."""
    from ieg_jax.data import image_files

    cells = [(row["path"] or "").strip() for _, row in image_files.list_rows(file, ["path"])]
    paths = [str(file.parent / cell) for cell in cells if cell]
    if not paths:
        raise UserError(f"{file}: no images listed")
    return paths


def _read_array(file: pathlib.Path) -> np.ndarray:
    """Images `[n, H, W, C]`, C = 1 or 3, uint8 or floats in [0, 1]; of an .npz file `images`, or its only array."""
    from ieg_jax.data.splits import check_images_and_labels

    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            with content:
                name = "images" if len(content.files) != 1 else content.files[0]
                if name not in content.files:
                    raise UserError(f"{file}: has {sorted(content.files)}, expected the array images")
                content = content[name]
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: cannot be read as {file.suffix} ({first_line(error)})") from None
    content = content[..., None] if content.ndim == 3 else content
    check_images_and_labels(content, np.zeros(len(content) if content.ndim else 0, np.int32), str(file), 0)
    return content


def define_flags() -> None:
    """Defines the command's flags; not when it is imported, for other commands have flags of the same names."""
    flags.DEFINE_string(
        "workdir", None, "Work folder of the run, or a folder that ieg_jax.export wrote the weights to.", required=True
    )
    flags.DEFINE_string("out", None, "New file for the table, .csv or .parquet; nothing is overwritten.", required=True)
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Which checkpoint: a step, or best (by checkpoint.best_metric); by default the newest that is not damaged.",
    )
    flags.DEFINE_bool("probabilities", False, "A column for each class besides.")
    flags.DEFINE_enum(
        "unreadable",
        "skip",
        ["skip", "refuse"],
        "Images that cannot be read: skip = their rows say why in the column error; refuse = every image is decoded "
        "before the first prediction, and if one cannot be, nothing is written.",
    )


def main(argv: list[str]) -> None:
    """Writes the table, and says how many images are in it."""
    values = flags.FLAGS
    print(predict(values.workdir, argv[1:], values.out, values.checkpoint, values.probabilities, values.unreadable))


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=None)
