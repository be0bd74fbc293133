"""What lists of examples say, CSV or Parquet: their rows, and the classes that the labels in them name."""

import csv
import dataclasses
import io
import itertools
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pyarrow
from etils import epath
from ml_collections import ConfigDict
from pyarrow import parquet

from ieg_jax import files
from ieg_jax.data.splits import UNKNOWN, in_lines
from ieg_jax.errors import UserError, first_line

SPLITS = ("train", "test", "trusted")
COLUMNS = ("path", "label", "clean_label", "given_label", "split")
OF_FEATURES = (*COLUMNS, "id", "text")
PARQUET = (".parquet", ".pq")
_NUMBER = re.compile(r"([+-]?\d+)(\.0*)?")  # pandas writes whole numbers as 3.0 in a column with gaps
_MISSING = ("nan", "NaN")  # as pandas and NumPy write that there is none
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
    file: epath.Path, needed: Sequence[str] = ("path", "label"), columns: Sequence[str] = COLUMNS
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


def _csv_rows(file: epath.Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except files.storage_errors() as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
    lines = text.splitlines(keepends=True)
    before = sum(1 for _ in itertools.takewhile(lambda line: not line.strip(), lines))
    header = lines[before] if before < len(lines) else ""
    delimiter = max(",;\t", key=header.count)
    if separator := re.fullmatch(r"sep=(.)\s*", header):  # a line that Excel reads and writes
        before, delimiter = before + 1, separator[1]
    content = io.StringIO("".join(lines[before:]), newline="")
    reader = csv.DictReader(content, delimiter=delimiter, skipinitialspace=True)
    columns = [(name or "").strip() for name in reader.fieldnames or []]
    _check_columns(columns, needed, file, f"a first line with {' and '.join(needed)}")
    reader.fieldnames = columns
    try:
        for row in reader:
            yield f"line {before + reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{file}, line {before + reader.line_num}: {error}; is a quotation mark left open?") from None


def _check_columns(columns: Sequence[str], needed: Sequence[str], file: epath.Path, expected: str) -> None:
    if not set(needed) <= set(columns):
        raise UserError(f"{file}: columns {list(columns)}, expected {expected}")
    for name in OF_FEATURES:
        if list(columns).count(name) > 1:
            raise UserError(f"{file}: columns {list(columns)}, {name!r} more than once; rename all but one")


def _parquet_rows(
    file: epath.Path, needed: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with files.opened(file) as content:
            present = parquet.read_schema(content).names
            _check_columns(present, needed, file, f"{' and '.join(needed)} among them")
            content.seek(0)
            table = files.read_parquet(content, [name for name in columns if name in present])
    except (*files.storage_errors(), pyarrow.ArrowException) as error:
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
    if values["label"] in _MISSING:
        raise UserError(f"{where}: label {values['label']!r}, as a missing value is written; expected a class")
    for name in ("label", "clean_label", "given_label"):  # one class, however an umlaut in its name is composed
        values[name] = "" if values[name] in _MISSING else unicodedata.normalize("NFC", values[name])
    if not all(values[name] for name in needed):
        got = ", ".join(f"{name} {values[name]!r}" for name in needed)
        raise UserError(f"{where}: {got}; expected {'both' if len(needed) == 2 else 'one'}")
    values["split"] = values["split"] or split
    if values["split"] not in SPLITS:
        raise UserError(f"{where}: split {values['split']!r}, expected one of {', '.join(SPLITS)}")
    if values["split"] != "trusted":
        values["given_label"] = ""
    return values


def of_role(listed: list[Listed], role: str, data: ConfigDict) -> tuple[list[Listed], list[str]]:
    """The rows of a list that count: those of its role, and of `data.train` also those of roles without a list.

    Args:
      listed: the rows of the list that `data.<role>` names.
      role: train, test or trusted.
      data: the group of the configuration.

    Returns:
      The rows; and a notice where others are left out.

    Raises:
      UserError: where none is left.
    """
    roles = [role] + [split for split in SPLITS if role == "train" and split != role and not data[split]]
    kept = [one for one in listed if one.split in roles]
    counts = {split: sum(one.split == split for one in listed) for split in SPLITS if split not in roles}
    others = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count)
    if not kept:
        raise UserError(
            f"data.{role}={data[role]}: no row with split {role!r} (its column split says: {others}); mend the column, "
            f"or leave it out, and all rows are for {role}"
        )
    notice = f"data.{role}={data[role]}: rows of other splits are not used ({others})"
    return kept, [notice] if others else []


def number_classes(listed: Sequence[Listed], num_classes: int, errors: Sequence[str] = ()) -> Classes:
    """Numbers the classes of the training examples, and checks that every label names one of them.

    Classes are in alphabetical order of their names, or where all are whole numbers as `numbered_classes` has it.

    Args:
      listed: the examples of all splits.
      num_classes: K, 0 = not known.
      errors: what was found to be wrong with the examples before.

    Raises:
      ListError: for everything that is wrong, with `errors`.
      UserError: where there is one class.
    """
    errors = list(errors)
    trained = _labels([one for one in listed if one.split == "train"])
    everything = trained | _labels(listed)
    if all(map(_NUMBER.fullmatch, trained)):
        values = {label: int(found[1]) for label in everything if (found := _NUMBER.fullmatch(label))}
        whole = {values[label] for label in trained}
        strange = strange_numbers(whole, num_classes)
        if strange:
            errors += [
                f"{one.where}: {strange[values[label]]}"
                for one in listed
                for label in _labels_of(one)
                if values.get(label) in strange
            ]
            raise ListError(errors, list(listed))
        order = numbered_classes(whole, num_classes)
        classes, places = tuple(map(str, order)), {value: place for place, value in enumerate(order)}
        numbers = {label: places[value] for label, value in values.items() if value in places}
    else:
        classes = tuple(sorted(trained))
        numbers = {name: number for number, name in enumerate(classes)}
    known = f"the {len(classes)} classes {', '.join(classes[:10])}" + (", ..." if len(classes) > 10 else "")
    errors += [
        f"{one.where}: label {label!r} is none of {known}"
        for one in listed
        for label in _labels_of(one)
        if label and label not in numbers
    ]
    if errors:
        raise ListError(errors, list(listed))
    if len(classes) < 2:
        raise UserError(f"all labels are {classes[0]!r}, expected at least two classes")
    return classes, numbers


def numbered_classes(labels: Collection[int], num_classes: int) -> tuple[int, ...]:
    """The classes, in order, where labels are whole numbers.

    They are the numbers that occur, so that labels may begin at 1 or have gaps. With `num_classes` K they are 0 … K-1,
    whether each occurs or not; unless K other numbers occur.

    Args:
      labels: those that occur.
      num_classes: K, 0 = not known.

    Raises:
      UserError: for numbers below 0, and those that are not 0 … K-1 and not K.
    """
    if strange := strange_numbers(labels, num_classes):
        raise UserError(next(iter(strange.values())))
    occurring = tuple(sorted(labels))
    inside = num_classes and set(occurring) <= set(range(num_classes))
    return tuple(range(num_classes)) if inside else occurring


def strange_numbers(labels: Collection[int], num_classes: int) -> dict[int, str]:
    """What is wrong with those labels that no class can be called by; see `numbered_classes`."""
    occurring = sorted(labels)
    if occurring[0] >= 0 and (len(occurring) == num_classes or not num_classes):
        return {}
    upper = f" to {num_classes - 1} (data.num_classes={num_classes})" if num_classes else ", or more"
    inside = range(num_classes or occurring[-1] + 1)
    advice = ""
    if occurring[0] >= 0:
        numbers = ", ".join(map(str, occurring[:10])) + (", ..." if len(occurring) > 10 else "")
        advice = f"; with data.num_classes=0 the {len(occurring)} numbers that occur are the classes, {numbers}"
    return {label: f"label {label}, expected 0{upper}{advice}" for label in occurring if label not in inside}


def first_of_class(listed: Sequence[Listed], numbers: dict[str, int]) -> tuple[str, ...]:
    """Where the first training example of each class is listed, "" where there is none; for messages."""
    found: dict[int, str] = {}
    for one in listed:
        if one.split == "train":
            found.setdefault(numbers[one.label], one.where)
    return tuple(found.get(number, "") for number in range(max(numbers.values()) + 1))


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


def _labels(listed: Sequence[Listed]) -> set[str]:
    return {label for image in listed for label in _labels_of(image) if label}


def _labels_of(image: Listed) -> tuple[str, str, str]:
    return image.label, image.clean_label, image.given_label
