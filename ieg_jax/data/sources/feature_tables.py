"""A user's own features in a table: Parquet with a column of vectors, or a NumPy array with a list beside it."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow
from etils import epath
from ml_collections import ConfigDict
from pyarrow import compute, parquet

from ieg_jax import files
from ieg_jax.data.sources import lists
from ieg_jax.data.sources.lists import PARQUET, SPLITS, Listed
from ieg_jax.data.splits import Source, Split, make_split
from ieg_jax.errors import UserError, first_line

ARRAY = ".npy"
ENDINGS = (ARRAY, *PARQUET)
VECTORS = "features"  # the column of a Parquet file


def read(data: ConfigDict) -> tuple[Source, dict[str, np.ndarray]]:
    """Lists the examples in `data.train`, and in `data.test` and `data.trusted` if they are set.

    A Parquet file has a column `features`, lists of D numbers. An array in an .npy file, `[n,D]`, has a list beside it,
    of the same name but for .csv or .parquet, whose row k is about the k-th vector. The other columns are those of
    lists of images: `label` and, where they are known, `split`, `clean_label` and `given_label`; `id`, any text by
    which an example is found again; and `path` of an image (relative to the file) or a `text`, which an audit shows.
    Of rows that say their split those count that `lists.of_role` names.

    Returns:
      The source, whose splits have no features yet (`images` is empty); ids are rows of the file. And split -> its
      features, `[n,D]`.

    Raises:
      ListError: for everything that is wrong with labels.
      UserError: for files that are missing or damaged, and rows or columns that are not as they should be.
    """
    listed, values, notices = [], {}, []
    for role in SPLITS:
        if where := getattr(data, role):
            file = files.place(where)
            features, found = vectors(file), _rows(file, role)
            if len(found) != len(features):
                raise UserError(
                    f"{file}: {len(features)} vectors, but {len(found)} rows in {_list_of(file)}; expected as many"
                )
            kept, told = lists.of_role(found, role, data)
            notices += told
            for split in SPLITS:
                rows = [one for one in kept if one.split == split]
                if rows:
                    listed += rows
                    values[split] = features[[one.row for one in rows]]
    if "train" not in values:
        raise UserError(f"data.train={data.train!r}: no row with split 'train'")
    classes, numbers = lists.number_classes(listed, data.num_classes)
    parts = {split: _to_split([one for one in listed if one.split == split], numbers) for split in values}
    name = epath.Path(data.train).stem
    source = Source(name, len(classes), parts["train"], parts.get("test"), parts.get("trusted"), classes)
    listed_at = lists.first_of_class(listed, numbers)
    return dataclasses.replace(source, listed_at=listed_at, notices=tuple(notices)), values


def vectors(file: epath.Path) -> np.ndarray:
    """The features in a file, `[n,D]` floats.

    Raises:
      UserError: for a file that is missing or damaged, and for vectors that differ in length or have gaps.
    """
    try:
        if file.suffix.lower() == ARRAY:
            return _array(file)
        with files.opened(file) as content:
            if VECTORS not in parquet.read_schema(content).names:
                raise UserError(f"{file}: no column {VECTORS!r}, expected one with a list of numbers in each row")
            content.seek(0)
            column = files.read_parquet(content, [VECTORS]).column(VECTORS).combine_chunks()
    except (*files.storage_errors(), ValueError, EOFError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as {file.suffix} ({first_line(error)})") from None
    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not is_list or not pyarrow.types.is_floating(kind.value_type):
        raise UserError(f"{file}: column {VECTORS!r} is of type {kind}, expected lists of floats")
    lengths = compute.list_value_length(column)
    if column.null_count or len(compute.unique(lengths)) != 1:
        raise UserError(f"{file}: column {VECTORS!r} has empty rows, or rows of different lengths")
    values = column.flatten()
    if values.null_count:
        raise UserError(f"{file}: column {VECTORS!r} has lists with empty places, expected numbers alone")
    return values.to_numpy().reshape(len(column), -1)


def _array(file: epath.Path) -> np.ndarray:
    with files.opened(file) as content:
        return np.load(content, allow_pickle=False)


def rewrite(file: epath.Path, out: epath.Path, labels: Mapping[int, str], dropped: Collection[int]) -> None:
    """Writes a copy of a table with other labels and without some rows, to be trained on like the table itself.

    Args:
      file: Parquet, or .npy with a list beside it.
      out: of the same ending; of .npy the list goes beside it, as .csv or .parquet.
      labels: row -> the name of its class. Those of other rows stay as they are. What a row was given before is in the
        column `given_label`.
      dropped: rows that are left out.

    Raises:
      UserError: where the table is no longer what it was.
      StorageError: where the copy cannot be written.
    """
    place = _list_of(file)
    kept = np.setdiff1d(np.arange(len(vectors(file))), sorted(dropped))
    try:
        if place.suffix.lower() in PARQUET:
            with files.opened(place) as content:
                table = files.read_parquet(content)
            columns = {
                name: table.column(name).to_pylist() for name in ("label", "given_label") if name in table.column_names
            }
        else:
            rows = [row for _, row in lists.list_rows(place, ("label",))]
            columns = {name: [row[name] for row in rows] for name in rows[0]}
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{place}: cannot be read ({first_line(error)})") from None
    given = columns.setdefault("given_label", [None] * len(columns["label"]))
    for row, label in labels.items():
        given[row] = columns["label"][row]
        columns["label"][row] = label
    buffer = io.BytesIO()
    if place.suffix.lower() in PARQUET:
        kind = table.schema.field("label").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            columns["label"] = list(map(int, columns["label"]))
        for name in ("label", "given_label"):
            column = pyarrow.array(columns[name], kind)
            exists = name in table.column_names
            table = (
                table.set_column(table.column_names.index(name), name, column)
                if exists
                else table.append_column(name, column)
            )
        parquet.write_table(table.take(kept), buffer)
        files.write(out.with_suffix(place.suffix), buffer.getvalue())
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([columns[name][row] or "" for name in columns] for row in kept)
        files.write(out.with_suffix(place.suffix), text.getvalue())
    if file.suffix.lower() == ARRAY:
        np.save(buffer := io.BytesIO(), vectors(file)[kept])
        files.write(out, buffer.getvalue())


def _list_of(file: epath.Path) -> epath.Path:
    """The file with the labels of a file of features."""
    if file.suffix.lower() != ARRAY:
        return file
    beside = [file.with_suffix(suffix) for suffix in (".csv", *PARQUET)]
    found = [place for place in beside if place.exists()]
    if len(found) != 1:
        names = " or ".join(place.name for place in beside)
        raise UserError(f"{file}: {len(found)} lists of its labels beside it, expected one, {names}")
    return found[0]


def _rows(file: epath.Path, split: str) -> list[Listed]:
    """The rows of a file of features that are not empty."""
    place, found, seen = _list_of(file), [], set()
    for number, (where, row) in enumerate(lists.list_rows(place, ("label",), lists.OF_FEATURES)):
        values = lists.described(row, f"{place}, {where}", split, ("label",))
        if values is None:
            raise UserError(f"{place}, {where}: empty, expected a label for each vector")
        key = values["split"], values["id"]
        if values["id"] and key in seen:
            raise UserError(f"{place}, {where}: id {key[1]!r} for the second time in {key[0]}, expected each once")
        seen.add(key)
        labels = (values[name] for name in ("label", "clean_label", "given_label", "split"))
        name = values["id"] or values["path"] or f"{file.name}/{number}"
        path = str(file.parent / values["path"]) if values["path"] else ""
        found.append(Listed(path, name, *labels, f"{place}, {where}", number, values["text"]))
    if not found:
        raise UserError(f"{place}: no rows in it")
    return found


def _to_split(listed: list[Listed], numbers: dict[str, int]) -> Split:
    labels, clean, given = lists.labels_as_numbers(listed, numbers)
    previews = np.empty(len(listed), object)
    previews[:] = [one.text or (pathlib.Path(one.path) if one.path else "") for one in listed]
    empty = np.empty((len(listed), 0), np.float32)
    split = make_split(empty, labels, clean, [one.name for one in listed], given)
    ids = np.array([one.row for one in listed], np.int64)
    return dataclasses.replace(split, ids=ids, previews=previews if any(previews) else None)
