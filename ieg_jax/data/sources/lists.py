"""What lists of examples say, CSV or Parquet: their rows, and the classes that the labels in them name."""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow
from pyarrow import parquet

from ieg_jax.data.splits import UNKNOWN, in_lines
from ieg_jax.errors import UserError, first_line

SPLITS = ("train", "test", "trusted")
COLUMNS = ("path", "label", "clean_label", "given_label", "split")
OF_FEATURES = (*COLUMNS, "id", "text")
PARQUET = (".parquet", ".pq")
_NUMBER = re.compile(r"[+-]?\d+")
Classes = tuple[tuple[str, ...], dict[str, int]]  # the names of the classes by number, and the numbers by written label


@dataclasses.dataclass(frozen=True)
class Listed:
    """One example of a folder or list.

    Attributes:
      path: of its image; "" = there is none.
      name: what it is called in reports: of an image its path relative to the base folder, if it lies below that.
      label: name of the class, as given.
      clean_label: name of the true class, "" = not known.
      given_label: name of the class that a trusted example was given before it was checked, "" = not known.
      split: train, test or trusted.
      where: the line of the list or the folder, for messages.
      row: of the list, from 0.
      text: that a person is shown; "" = none.
    """

    path: str
    name: str
    label: str
    clean_label: str
    given_label: str
    split: str
    where: str
    row: int = 0
    text: str = ""


class ListError(UserError):
    """The lists cannot be used. `paths`, name -> path, has the images in them, for whoever wants to check these too."""

    def __init__(self, errors: list[str], listed: list[Listed]):
        """Says how many errors there are, and the first of them."""
        super().__init__(_all_of(errors))
        self.paths = {image.name: image.path for image in listed}


def list_rows(
    file: pathlib.Path, needed: Sequence[str] = ("path", "label"), columns: Sequence[str] = COLUMNS
) -> Iterator[tuple[str, dict[str, str]]]:
    """Reads the rows of a list: as Parquet where its name ends in one of PARQUET, else as CSV.

    Args:
      file: the list, which exists.
      needed: columns that it must have.
      columns: that are read of a Parquet file; of CSV all are.

    Yields:
      Where the row is, for messages; and its values as text, by column.

    Raises:
      UserError: for a file that is damaged or lacks a column.
    """
    return _parquet_rows(file, needed, columns) if file.suffix.lower() in PARQUET else _csv_rows(file, needed)


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


def _parquet_rows(
    file: pathlib.Path, needed: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        present = parquet.read_schema(file).names
        if not set(needed) <= set(present):
            raise UserError(f"{file}: columns {present}, expected {' and '.join(needed)} among them")
        # The path as a file object: pyarrow would take folders named a=b for columns.
        with file.open("rb") as content:
            table = parquet.read_table(content, columns=[name for name in columns if name in present])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({first_line(error)})") from None
    found = {name: _as_text(table.column(name), f"{file}: column {name!r}") for name in table.column_names}
    for number, values in enumerate(zip(*found.values(), strict=True)):
        yield f"row {number}", dict(zip(found, values, strict=True))


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


def described(row: dict[str, str], where: str, split: str, needed: Sequence[str]) -> dict[str, str] | None:
    """The cells of a row, without blanks around them; None for a row with nothing in it.

    Args:
      row: from `list_rows`.
      where: it is, for messages.
      split: of rows that do not say one themselves.
      needed: columns that must not be empty.

    Returns:
      A value for each of OF_FEATURES, "" where there is none. `given_label` is that of trusted examples alone: of
      others, as in cleaned.csv, it says nothing.

    Raises:
      UserError: for a row with too many cells, an empty one that is needed, or a split of another name.
    """
    if None in row:
        raise UserError(f"{where}: {len(row[None])} cells too many; a path with the separator in it needs quotes")
    values = dict.fromkeys(OF_FEATURES, "") | {key: (value or "").strip() for key, value in row.items()}
    if not any(values.values()):
        return None
    if not all(values[name] for name in needed):
        got = ", ".join(f"{name} {values[name]!r}" for name in needed)
        raise UserError(f"{where}: {got}; expected {'both' if len(needed) == 2 else 'one'}")
    values["split"] = values["split"] or split
    if values["split"] not in SPLITS:
        raise UserError(f"{where}: split {values['split']!r}, expected one of {', '.join(SPLITS)}")
    if values["split"] != "trusted":
        values["given_label"] = ""
    return values


def number_classes(listed: Sequence[Listed], num_classes: int, by_number: bool, errors: Sequence[str] = ()) -> Classes:
    """Numbers the classes of the training examples, and checks that every label names one of them.

    Args:
      listed: the examples of all splits.
      num_classes: K, 0 = not known.
      by_number: whether labels that are all whole numbers are the numbers of the classes; else these are in their
        order, as those of folders.
      errors: what was found to be wrong with the examples before.

    Raises:
      ListError: for everything that is wrong, with `errors`.
      UserError: where there is one class.
    """
    trained, errors = [one for one in listed if one.split == "train"], list(errors)
    classes, numbers = (_number_labels if by_number else _number_names)(trained, num_classes, errors)
    known = f"the {len(classes)} classes {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else "")
    errors += [
        f"{one.where}: label {label!r} is none of {known}"
        for one in listed
        for label in _labels_of(one)
        if label and label not in numbers
    ]
    if errors:
        raise ListError(errors, listed)
    if len(classes) < 2:
        raise UserError(f"all labels are {classes[0]!r}, expected at least two classes")
    return classes, numbers


def labels_as_numbers(listed: Sequence[Listed], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`label`, `clean_label` and `given_label` of the examples of one split, `[n]` each, UNKNOWN where not known."""
    labels, clean, given = (
        np.array([numbers[name] if name else UNKNOWN for name in (getattr(one, column) for one in listed)])
        for column in ("label", "clean_label", "given_label")
    )
    if listed[0].split != "train":
        labels = clean = np.where(clean == UNKNOWN, labels, clean)  # taken to be true here
    return labels, clean, given


def _all_of(errors: list[str]) -> str:
    return errors[0] if len(errors) == 1 else f"{len(errors)} things are wrong with what is listed:\n{in_lines(errors)}"


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
