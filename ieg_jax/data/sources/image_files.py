"""A user's own images: a folder for each class, or a list (CSV or Parquet) of paths and labels."""

import csv
import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow
from ml_collections import ConfigDict
from pyarrow import parquet

from ieg_jax.data.images import FileImages
from ieg_jax.data.splits import UNKNOWN, Source, Split, in_lines, make_split
from ieg_jax.errors import UserError, first_line

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm",
}  # fmt: skip
SPLITS = ("train", "test", "trusted")
COLUMNS = ("path", "label", "clean_label", "given_label", "split")
PARQUET = (".parquet", ".pq")
_NUMBER = re.compile(r"[+-]?\d+")
Classes = tuple[tuple[str, ...], dict[str, int]]  # the names of the classes by number, and the numbers by written label


@dataclasses.dataclass(frozen=True)
class Listed:
    """One image of a folder or list.

    Attributes:
      path: of the file.
      name: what it is called in reports: its path relative to the base folder, if it lies below that.
      label: name of the class, as given.
      clean_label: name of the true class, "" = not known.
      given_label: name of the class that a trusted image was given before it was checked, "" = not known.
      split: train, test or trusted.
      where: the line of the list or the folder, for messages.
    """

    path: str
    name: str
    label: str
    clean_label: str
    given_label: str
    split: str
    where: str


class ListError(UserError):
    """The lists cannot be used. `paths`, name -> path, has the images in them, for whoever wants to check these too."""

    def __init__(self, errors: list[str], listed: list[Listed]):
        """Says how many errors there are, and the first of them."""
        super().__init__(_all_of(errors))
        self.paths = {image.name: image.path for image in listed}


def image_folder(data: ConfigDict) -> Source:
    """Folders with one folder for each class: `data.train`/class/x.jpg; `data.test` and `data.trusted` likewise.

    The classes are the folders' names, in alphabetical order or, where all are whole numbers, in the order of the
    numbers. Files that do not end in one of SUFFIXES, or begin with a dot, are no images. `data.test` and
    `data.trusted` may also be lists, see `image_csv`.

    Raises:
      ListError: for everything that is wrong with what is listed, at once.
      UserError: for folders and lists that are missing or empty.
    """
    if not data.train or not pathlib.Path(data.train).expanduser().is_dir():
        raise UserError(f"data.train={data.train!r}: no such folder; data.name=image_folder expects class/x.jpg there")
    return _load(data, _number_names)


def image_csv(data: ConfigDict) -> Source:
    """Lists with the columns `path` and `label`; optional `split`, `clean_label` and `given_label`.

    A file that ends in `.parquet` or `.pq` is read as Parquet, every other one as CSV with a header.
    Paths are relative to `data.dir`, or to the list's own folder where it is empty. `split` is train, test or
    trusted. `data.test` and `data.trusted` name further lists, or folders as for `image_folder`. Labels are names
    of classes, sorted; or, where all are whole numbers, the numbers themselves. In the training set `label` is what is
    learned from and `clean_label` is for diagnostics; of an image for testing or trusted, whose label has to be true,
    `clean_label` is the label where it is given. `given_label` of a trusted image is the label that it had before
    somebody checked it, right or wrong, from which an audit learns how often labels are wrong.

    Raises:
      ListError: for everything that is wrong with what is listed, at once.
      UserError: for folders and lists that are missing, damaged or empty.
    """
    if not data.train or not pathlib.Path(data.train).expanduser().is_file():
        raise UserError(
            f"data.train={data.train!r}: no such file; data.name=image_csv expects a CSV or Parquet file there"
        )
    return _load(data, _number_labels)


def _load(data: ConfigDict, number_classes: Callable[[list[Listed], int, list[str]], Classes]) -> Source:
    """Lists the images of all splits; `number_classes` is `_number_names` or `_number_labels`."""
    base, listed = base_folder(data), []
    for split in SPLITS:
        if where := getattr(data, split):
            listed += list_images(pathlib.Path(where).expanduser(), base, split, bool(data.dir))
    listed, errors = _without_repeats(listed)
    trained = [image for image in listed if image.split == "train"]
    if not trained:
        raise UserError(f"data.train={data.train!r}: no training images in it")
    classes, numbers = number_classes(trained, data.num_classes, errors)
    known = f"the {len(classes)} classes {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else "")
    errors += [
        f"{image.where}: label {label!r} is none of {known}"
        for image in listed
        for label in _labels_of(image)
        if label and label not in numbers
    ]
    if errors:
        raise ListError(errors, listed)
    if len(classes) < 2:
        raise UserError(f"all labels are {classes[0]!r}, expected at least two classes")
    parts = {split: _to_split([image for image in listed if image.split == split], numbers) for split in SPLITS}
    return Source(base.name or "images", len(classes), parts["train"], parts["test"], parts["trusted"], classes)


def base_folder(data: ConfigDict) -> pathlib.Path:
    """The folder that names of images are relative to: `data.dir`, or where `data.train` is."""
    base = pathlib.Path(data.dir or data.train).expanduser()
    return base if base.is_dir() else base.parent


def list_images(where: pathlib.Path, base: pathlib.Path, split: str, relative_to_base: bool) -> list[Listed]:
    """The images of a folder with a folder for each class, or of a list.

    Args:
      where: the folder or list.
      base: names are relative to it.
      split: the split of images that do not say one themselves.
      relative_to_base: paths in a list are relative to `base` rather than to the list's own folder.

    Raises:
      UserError: for a folder without classes, a class without images, a list without the two columns, a line
        without path or label, or a split of another name.
    """
    if where.is_dir():
        return _list_folder(where, base, split)
    if where.is_file():
        return _read_list(where, base, split, relative_to_base)
    raise UserError(f"data.{split}={str(where)!r}: no such folder or list")


def _list_folder(folder: pathlib.Path, base: pathlib.Path, split: str) -> list[Listed]:
    classes = [entry for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if not classes:
        raise UserError(f"data.{split}={str(folder)!r}: no folders in it; expected one for each class, with its images")
    listed = []
    for place in classes:
        paths = list(images_below(place, set()))
        if not paths:
            raise UserError(
                f"data.{split}: class {place.name!r} has no images in {place} "
                f"(files ending in {', '.join(sorted(SUFFIXES))}); remove the folder or fill it"
            )
        listed += [
            Listed(str(p), _name(str(p), str(base)), place.name, "", "", split, f"{place}: {p.name}") for p in paths
        ]
    return listed


def images_below(folder: pathlib.Path, seen: set[str]) -> Iterator[pathlib.Path]:
    """The image files of a folder and of those in it. Each folder is searched once, however many links lead there."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from images_below(entry, seen)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None


def _read_list(file: pathlib.Path, base: pathlib.Path, split: str, relative_to_base: bool) -> list[Listed]:
    root, listed, errors = str(base if relative_to_base else file.parent), [], []
    for where, row in list_rows(file):
        try:
            image = _listed(row, f"{file}, {where}", root, str(base), split)
            listed += [image] if image else []
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise ListError(errors, listed)
    if not listed:
        raise UserError(f"{file}: no images listed")
    return listed


def list_rows(file: pathlib.Path, needed: Sequence[str] = ("path", "label")) -> Iterator[tuple[str, dict[str, str]]]:
    """Reads the rows of a list: as Parquet where its name ends in one of PARQUET, else as CSV.

    Args:
      file: the list, which exists.
      needed: columns that it must have.

    Yields:
      Where the row is, for messages; and its values as text, by column.

    Raises:
      UserError: for a file that is damaged or lacks a column.
    """
    return (_parquet_rows if file.suffix.lower() in PARQUET else _csv_rows)(file, needed)


def _csv_rows(file: pathlib.Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = [(name or "").strip() for name in reader.fieldnames or []]
    if not set(needed) <= set(columns):
        raise UserError(f"{file}: columns {columns}, expected a first line with {' and '.join(needed)}")
    reader.fieldnames = columns
    try:
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}; is a quotation mark left open?") from None


def _parquet_rows(file: pathlib.Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        present = parquet.read_schema(file).names
        if not set(needed) <= set(present):
            raise UserError(f"{file}: columns {present}, expected {' and '.join(needed)} among them")
        # The path as a file object: pyarrow would take folders named a=b for columns.
        with file.open("rb") as content:
            table = parquet.read_table(content, columns=[name for name in COLUMNS if name in present])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({first_line(error)})") from None
    columns = {name: _as_text(table.column(name), f"{file}: column {name!r}") for name in table.column_names}
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        yield f"row {number}", dict(zip(columns, values, strict=True))


def _as_text(column: pyarrow.ChunkedArray, where: str) -> list[str]:
    """The values of a column as text, "" where there is none.

    Raises:
      UserError: for values that are neither text nor whole numbers. Floats are accepted if all are whole: pandas turns
        whole numbers into floats where some are missing.
    """
    values = column.to_pylist()
    if all(value is None or isinstance(value, str) for value in values):
        return [value or "" for value in values]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None):
        empty = [value is None or value != value for value in values]  # nan differs from itself
        if all(none or float(value).is_integer() for value, none in zip(values, empty, strict=True)):
            return ["" if none else str(int(value)) for value, none in zip(values, empty, strict=True)]
    raise UserError(f"{where} is of type {column.type}, expected text or whole numbers")


def _listed(row: dict, where: str, root: str, base: str, split: str) -> Listed | None:
    """The image that one row lists; None for a row with nothing in it."""
    if None in row:
        raise UserError(f"{where}: {len(row[None])} cells too many; a path with the separator in it needs quotes")
    values = {key: (value or "").strip() for key, value in row.items()}
    if not any(values.values()):
        return None
    if not values["path"] or not values["label"]:
        raise UserError(f"{where}: path {values['path']!r}, label {values['label']!r}; expected both")
    if any(character in values["path"] for character in "\r\n\0"):
        raise UserError(
            f"{where}: path {values['path'][:40]!r}... goes over several lines; is a quotation mark left open?"
        )
    part = values.get("split") or split
    if part not in SPLITS:
        raise UserError(f"{where}: split {part!r}, expected one of {', '.join(SPLITS)}")
    path = os.path.join(root, values["path"])
    given = values.get("given_label", "") if part == "trusted" else ""  # of others, as in cleaned.csv, it says nothing
    return Listed(path, _name(path, base), values["label"], values.get("clean_label", ""), given, part, where)


def _name(path: str, base: str) -> str:
    path, base = os.path.abspath(path), os.path.abspath(base)
    return path.removeprefix(base + os.sep)


def _all_of(errors: list[str]) -> str:
    return errors[0] if len(errors) == 1 else f"{len(errors)} things are wrong with what is listed:\n{in_lines(errors)}"


def _without_repeats(listed: list[Listed]) -> tuple[list[Listed], list[str]]:
    """Each image once in each split; and an error for each that is listed again with another label."""
    seen: dict[tuple[str, str], Listed] = {}
    errors = []
    for image in listed:
        first = seen.setdefault((image.split, image.name), image)
        for column in ("label", "clean_label", "given_label"):
            got, before = getattr(image, column), getattr(first, column)
            if got != before:
                errors.append(
                    f"{image.where}: {image.name} has {column} {got!r}, but {before!r} in {first.where}; keep one of "
                    f"the two"
                )
    return list(seen.values()), errors


def _labels(listed: list[Listed]) -> set[str]:
    return {label for image in listed for label in _labels_of(image) if label}


def _labels_of(image: Listed) -> tuple[str, str, str]:
    return image.label, image.clean_label, image.given_label


def _number_names(listed: list[Listed], num_classes: int, errors: list[str]) -> Classes:
    """Numbers the classes in alphabetical order of their names, or in the order of whole numbers where all are such."""
    del num_classes, errors
    written = _labels(listed)
    key = int if all(map(_NUMBER.fullmatch, written)) else None
    classes = tuple(sorted(written, key=key))
    return classes, {name: number for number, name in enumerate(classes)}


def _number_labels(listed: list[Listed], num_classes: int, errors: list[str]) -> Classes:
    """Like `_number_names`, but where all labels are whole numbers, each is the number of its class.

    What is wrong with such numbers is added to `errors`.
    """
    written = _labels(listed)
    if not all(map(_NUMBER.fullmatch, written)):
        return _number_names(listed, num_classes, errors)
    numbers = {label: int(label) for label in written}
    highest = max(numbers.values())
    upper = f"to {num_classes - 1} (data.num_classes)" if num_classes else "and up"
    outside = [
        f"{image.where}: label {label}, expected 0 {upper}"
        for image in listed
        for label in _labels_of(image)
        if label and not 0 <= numbers[label] < (num_classes or highest + 1)
    ]
    if not num_classes and not outside:
        present = {numbers[image.label] for image in listed}
        empty = next((number for number in range(highest + 1) if number not in present), None)
        if empty is not None:
            outside.append(
                f"labels go up to {highest}, but class {empty} has no training images; "
                f"set data.num_classes={highest + 1} if that is meant"
            )
    if outside:
        errors += outside
        # Only the classes that occur are returned: with a mistyped number the list of all could be very long.
        return tuple(sorted(written, key=int)), numbers
    classes = tuple(str(number) for number in range(num_classes or highest + 1))
    return classes, {name: number for number, name in enumerate(classes)} | numbers


def _to_split(listed: list[Listed], numbers: dict[str, int]) -> Split | None:
    if not listed:
        return None
    labels = np.array([numbers[image.label] for image in listed])
    clean, given = (
        np.array([numbers[name] if name else UNKNOWN for name in (getattr(image, column) for image in listed)])
        for column in ("clean_label", "given_label")
    )
    if listed[0].split != "train":
        labels = clean = np.where(clean == UNKNOWN, labels, clean)  # taken to be true here
    images = FileImages(np.array([image.path for image in listed], object))
    return make_split(images, labels, clean, [image.name for image in listed], given)
