"""A user's own arrays: images or features in an .npz file, and features in tables."""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import files
from ieg_jax.data.sources import feature_tables, lists
from ieg_jax.data.splits import UNKNOWN, Source, Split, check_images_and_labels, check_labels, make_split
from ieg_jax.errors import UserError

ROWS_AT_ONCE = 65_536  # rows of features that are in memory as float64 at the same time


def arrays(data: ConfigDict) -> Source:
    """A user's own .npz file, `data.train`.

    It holds the arrays `images` `[n,H,W]` or `[n,H,W,C]`, uint8 or floats in [0, 1], and `labels` `[n]` integers, as
    given. Optional are `clean_labels` `[n]` (true labels, -1 where not known), `test_images` and `test_labels`,
    `trusted_images` and `trusted_labels`, and `trusted_given_labels`, those that these had before they were checked (-1
    where not known), from which an audit learns how often labels are wrong; and `class_names` `[K]`, texts, of the
    labels 0 … K-1. Without names the classes are as `lists.numbered_classes` has it, so labels may begin at 1.

    Raises:
      UserError: for a file that is missing, damaged or lacks an array, and for arrays of another shape, dtype or range.
    """

    def check(pixels: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.shape[1:3] == (1, 1):
            raise UserError(f"{where}: shape {pixels.shape}, images of one pixel; for features set data.name=features")
        check_images_and_labels(pixels, labels, where, 0)
        return pixels

    return _own_arrays(data, _read_npz(data.train, ("images", "labels"), data.name), "images", check)


def features(data: ConfigDict) -> Source:
    """A user's own features (embeddings) in an .npz file, `data.train`, or in tables, see `feature_tables.read`.

    The .npz file holds the arrays `features` `[n,D]` floats and `labels` `[n]` integers, as given. Optional are
    `clean_labels`, `test_features` and `test_labels`, `trusted_features`, `trusted_labels` and `trusted_given_labels`,
    as for `arrays`.
    Each of the D numbers is standardised: its mean in the training set is subtracted, and it is divided by its standard
    deviation there. Features are held as images of one pixel with D channels, float32 `[n,1,1,D]`, which the pipeline
    does not scale.

    Raises:
      UserError: as for `arrays` and `feature_tables.read`; and where `data.image_size` is set.
    """
    if data.image_size:
        raise UserError(f"data.image_size={data.image_size}, but features have no pixels; set it to 0")
    statistics, notices = None, ()

    def check(values: np.ndarray, where: str) -> np.ndarray:
        nonlocal statistics, notices
        _check_features(values, where)
        if statistics is None:  # those of the training set, which comes first
            statistics, notices = feature_statistics(values), outliers(values, where)
        if values.shape[1] != len(statistics[0]):
            raise UserError(
                f"{where}: {values.shape[1]} numbers in a row, expected {len(statistics[0])} as in features"
            )
        return standardised(values, *statistics)

    def check_both(values: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
        _check_features(values, where)
        check_labels(labels, len(values), f"{where}: their labels", 0, lowest=0)
        return check(values, where)

    if epath.Path(data.train).suffix.lower() in feature_tables.ENDINGS:
        source, values = feature_tables.read(data)
        whole = {
            split: dataclasses.replace(getattr(source, split), images=check(values[split], f"{data.train}: {split}"))
            for split in values
        }
        return dataclasses.replace(source, **whole, notices=(*source.notices, *notices))
    besides = [f"data.{name}" for name in ("test", "trusted") if getattr(data, name)]
    if besides:
        raise UserError(
            f"{' and '.join(besides)} are set, but an .npz file as data.train has these examples in it (test_features, "
            f"trusted_features); expected none of them, or a table ({', '.join(feature_tables.ENDINGS)}) as data.train"
        )
    source = _own_arrays(data, _read_npz(data.train, ("features", "labels"), data.name), "features", check_both)
    return dataclasses.replace(source, notices=notices)


def read_features(data: ConfigDict, file: str) -> Split:
    """Features to be predicted, standardised in the same way as those that a network was trained on.

    Args:
      data: the group `data` of the run's configuration. The file `data.train` must still be there, as mean and
        deviation are computed from it.
      file: .npz with the array `features` `[n,D]`, and perhaps `labels` `[n]`; .npy with such an array, or Parquet with
        a column `features`.

    Returns:
      The split; labels are UNKNOWN where the file has none.

    Raises:
      UserError: for either file, where it is missing or damaged or its arrays do not fit.
    """
    labels = None
    if epath.Path(data.train).suffix.lower() in feature_tables.ENDINGS:
        trained = feature_tables.read(data)[1]["train"]
    else:
        trained = _read_npz(data.train, ("features",), data.name)["features"]
    if epath.Path(file).suffix.lower() in feature_tables.ENDINGS:
        values = feature_tables.vectors(files.place(file))
    else:
        content = _read_npz(file, ("features",), data.name)
        values, labels = content["features"], content.get("labels")
    for array, where in ((trained, data.train), (values, file)):
        _check_features(array, f"{where}: features")
    if values.shape[1] != trained.shape[1]:
        raise UserError(f"{file}: {values.shape[1]} numbers in a row, expected {trained.shape[1]} as in {data.train}")
    labels = np.full(len(values), UNKNOWN) if labels is None else labels
    check_labels(labels, len(values), f"{file}: labels", data.num_classes, lowest=UNKNOWN)
    return make_split(standardised(values, *feature_statistics(trained)), labels, labels)


def feature_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 `[D]`, of features `[n,D]`; a deviation of 0 is returned as 1."""
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(values), ROWS_AT_ONCE)]
    mean = sum(values[part].sum(0, np.float64) for part in parts) / len(values)
    variance = sum(np.square(values[part] - mean).sum(0) for part in parts) / len(values)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def outliers(values: np.ndarray, where: str) -> tuple[str, ...]:
    """A notice where one number of a column of features `[n,D]` is 1,000 times any other, which it makes all alike."""
    if len(values) < 3:
        return ()
    parts = (np.abs(values[:, start : start + 64]) for start in range(0, values.shape[1], 64))  # not all in memory
    second, largest = np.concatenate([np.partition(part, -2, axis=0)[-2:] for part in parts], 1)
    found = np.flatnonzero((second > 0) & (largest > 1000 * second))
    if not len(found):
        return ()
    column = found[0]
    row = np.abs(values[:, column]).argmax()
    return (
        f"{where}: row {row} has {values[row, column]:.3g} in column {column}, over 1,000 times any "
        f"other number there, which are all but equal once the column is standardised"
        + (f"; {len(found)} columns have such a number" if len(found) > 1 else ""),
    )


def standardised(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """(x − mean) / deviation of features `[n,D]`, as images of one pixel: float32 `[n,1,1,D]`."""
    result = np.empty((len(values), 1, 1, values.shape[1]), np.float32)
    for start in range(0, len(values), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        result[part, 0, 0] = (values[part] - mean) / deviation
    return result


def _check_features(values: np.ndarray, where: str) -> None:
    if values.ndim != 2 or values.dtype.kind != "f" or 0 in values.shape:
        raise UserError(
            f"{where}: shape {values.shape}, dtype {values.dtype}, expected floats [n, D], at least one row"
        )
    bad = np.flatnonzero(~np.isfinite(values.sum(1, np.float64)))
    if len(bad):
        raise UserError(f"{where}: row {bad[0]} has numbers that are nan or infinite; {len(bad)} of {len(values)} do")


def _read_npz(file: str, needed: tuple[str, ...], name: str) -> dict[str, np.ndarray]:
    if not file:
        raise UserError(f"data.name={name} needs data.train, the path of an .npz file with {' and '.join(needed)}")
    path = files.place(file)
    try:
        content = files.read_arrays(path)
    except (
        *files.storage_errors(),
        ValueError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:
        raise UserError(f"{path}: cannot be read as .npz ({type(error).__name__}: {error})") from None
    if any(array not in content for array in needed):
        raise UserError(f"{path}: has {sorted(content)}, expected at least the arrays {' and '.join(needed)}")
    return content


def _own_arrays(
    data: ConfigDict,
    content: dict[str, np.ndarray],
    what: str,
    check: Callable[[np.ndarray, np.ndarray, str], np.ndarray],
) -> Source:
    """Makes a source of a user's arrays.

    Args:
      data: the group of the configuration.
      content: the arrays in `data.train`.
      what: `images` or `features`.
      check: (examples, labels, where for messages) -> the examples as a split has them; the training set comes first.
    """
    path = files.place(data.train)

    def read(prefix: str) -> Split | None:
        examples, labels = content.get(f"{prefix}{what}"), content.get(f"{prefix}labels")
        if (examples is None) != (labels is None):
            raise UserError(f"{path}: has only one of {prefix}{what} and {prefix}labels, expected both or none")
        if examples is None:
            return None
        examples = check(examples, labels, f"{path}: {prefix}{what}")
        clean = content.get("clean_labels") if not prefix else None
        if clean is not None:
            check_labels(clean, len(labels), f"{path}: clean_labels", 0, lowest=-1)
        given = content.get("trusted_given_labels") if prefix == "trusted_" else None
        if given is not None:
            check_labels(given, len(labels), f"{path}: trusted_given_labels", 0, lowest=-1)
        names = np.array([f"{prefix}{what}/{row}" for row in range(len(labels))], object)
        # The labels of examples for testing, and of trusted ones, are taken to be true.
        return make_split(examples, labels, clean if not prefix else labels, names, given)

    train, test, trusted = read(""), read("test_"), read("trusted_")
    for name, split in ((f"test_{what}", test), (f"trusted_{what}", trusted)):
        if split is not None and split.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"{path}: {name} have shape {split.images.shape[1:]}, expected {train.images.shape[1:]} as {what}"
            )
    splits = [split for split in (train, test, trusted) if split is not None]
    columns = ("labels", "clean_labels", "given_labels")
    occurring = np.unique(np.concatenate([getattr(split, name) for split in splits for name in columns]))
    occurring = set(occurring.tolist()) - {UNKNOWN}
    names = content.get("class_names", np.array([], str))
    if names.dtype.kind != "U" or names.ndim != 1 or 0 < len(names) <= max(occurring):
        raise UserError(
            f"{path}: class_names of shape {names.shape} and dtype {names.dtype}, expected at least "
            f"{max(occurring) + 1} texts"
        )
    if len(names):
        classes, class_names = tuple(range(len(names))), tuple(names.tolist())
    else:
        try:
            classes = lists.numbered_classes(occurring, data.num_classes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        class_names = tuple(map(str, classes))
    if len(classes) < 2:
        raise UserError(f"{path}: all labels are {classes[0]}, expected at least two classes")
    train, test, trusted = map(functools.partial(_renumbered, classes), (train, test, trusted))
    return Source(path.stem, len(classes), train, test, trusted, class_names)


def _renumbered(classes: tuple[int, ...], split: Split | None) -> Split | None:
    """A split whose labels are numbers of `classes`, with the places of these in place of the numbers."""
    if split is None or classes == tuple(range(len(classes))):
        return split
    columns = {name: getattr(split, name) for name in ("labels", "clean_labels", "given_labels")}
    placed = {
        name: np.where(column < 0, column, np.searchsorted(classes, column)).astype(np.int32)
        for name, column in columns.items()
    }
    return dataclasses.replace(split, **placed)
