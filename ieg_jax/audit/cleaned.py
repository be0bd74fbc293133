"""Writes cleaned.csv and its kin: the labels of a run, of which the wrong ones are replaced or left out."""

import array
import csv
import json
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from ieg_jax import files
from ieg_jax.audit.files import BEGUN, SUMMARY, TABLE, read_exported
from ieg_jax.data.sources import feature_tables
from ieg_jax.data.splits import in_lines
from ieg_jax.errors import UserError, first_line

ACTIONS = ("keep", "relabel", "drop")
COLUMNS = ("id", "path", "given_label", "suggested_label", "p_right")
TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # as `files.write` has it


def write(
    audit: epath.Path, out: epath.Path, threshold: float = 0.5, below: str = "relabel", marks: str = ""
) -> dict[str, int]:
    """Writes the list.

    Args:
      audit: the folder that ieg_jax.audit wrote its tables to.
      out: the file: .csv, with the columns path, label, given_label and id; or, of data that were an .npz file or a
        table of features, a name with the ending of that, for a copy with other labels and without the examples that
        are dropped.
      threshold: labels with P(right) below it are not kept.
      below: what becomes of these: relabel or drop.
      marks: marks.csv as the page exports it, which decides for the examples in it; "" = none.

    Returns:
      How many examples each of ACTIONS was taken for.

    Raises:
      UserError: where the audit or the marks cannot be read, or nothing would be left.
      StorageError: where the list cannot be written.
    """
    if not (audit / TABLE).exists():
        raise UserError(f"{audit} has no {TABLE}, expected a folder that ieg_jax.audit wrote")
    begun = json.loads((audit / BEGUN).read_text())
    base, names = begun["base"], set(begun["class_names"])
    is_copy = out.suffix in (".npz", *feature_tables.ENDINGS)
    if is_copy:
        file = epath.Path(begun.get("arrays", ""))
        if file.suffix.lower() != out.suffix.lower():
            expected = f".csv or {file.suffix}" if file.suffix else ".csv"
            raise UserError(f"{out}: the data of this audit are no {out.suffix} file; expected a name in {expected}")
    marked = read_marks(marks, _ids(audit), names) if marks else {}
    counts = dict.fromkeys(ACTIONS, 0)

    def decided() -> Iterator[tuple[dict, str, str]]:
        """Each row with what is done about it, and its label then."""
        with files.opened(audit / TABLE) as stream:
            for group in files.parquet_groups(stream, COLUMNS):
                for row in group.to_pylist():
                    usual = "keep" if row["p_right"] >= threshold else below
                    action, label = marked.get(row["id"], (usual, row["suggested_label"]))
                    counts[action] += 1
                    yield row, action, row["given_label"] if action == "keep" else label
        if not counts["keep"] + counts["relabel"]:
            total = sum(counts.values())
            raise UserError(f"all {total} examples would be dropped; lower --threshold, or set fewer marks")

    if is_copy:
        places = {name: number for number, name in enumerate(begun["class_names"])}
        ids, labels, dropped = array.array("q"), array.array("q"), array.array("q")
        for row, action, label in decided():
            if action == "drop":
                dropped.append(row["id"])
            else:
                ids.append(row["id"])
                labels.append(places[label])
        if out.suffix == ".npz":
            files.write_arrays(out, _arrays(file, *map(np.array, (ids, labels, dropped))), compressed=False)
        else:
            by_name = {row: begun["class_names"][label] for row, label in zip(ids, labels, strict=True)}
            feature_tables.rewrite(file, out, by_name, dropped)
        return counts
    with files.complete_or_absent(out) as place, open(place, "w", **TEXT) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["path", "label", "given_label", "id"])
        for row, action, label in decided():
            if action != "drop":
                path = os.path.join(base, row["path"]) if base else row["path"]
                writer.writerow([path, label, row["given_label"], row["id"]])
    return counts


def _ids(audit: epath.Path) -> set[int]:
    """The ids of the audit's examples."""
    with files.opened(audit / TABLE) as stream:
        return {one for group in files.parquet_groups(stream, ["id"]) for one in group["id"].to_pylist()}


def _arrays(file: epath.Path, ids: np.ndarray, labels: np.ndarray, dropped: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the .npz file that a run was trained on, cleaned.

    Args:
      file: its path.
      ids: `[n]` int, the places in the file of those that are kept.
      labels: `[n]` int, theirs.
      dropped: ids of the others.
    """
    try:
        arrays = files.read_arrays(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); it has to be where it was") from None
    # Examples that the run took out as trusted are in the file still, and keep their labels.
    arrays["labels"][ids] = labels
    whole = len(arrays["labels"])
    for name in ("features", "images", "labels", "clean_labels"):
        if name in arrays and len(arrays[name]) == whole:
            arrays[name] = np.delete(arrays[name], dropped, 0)
    return arrays


def refuse_alarms(audit: epath.Path) -> None:
    """Raises UserError where the audit raised alarms: a list that was cleaned by it may be worse than before."""
    summary = audit / SUMMARY
    alarms = json.loads(summary.read_text()).get("alarms", []) if summary.exists() else []
    if alarms:
        raise UserError(
            f"{audit} raised alarms:\n{in_lines(alarms)}\nadd --force to clean the labels by it all the same"
        )


def read_marks(file: str, ids: set[int], names: set[str]) -> dict[int, tuple[str, str]]:
    """Reads the marks in a file: id -> (action, label).

    Args:
      file: .csv with the columns id, mark and label.
      ids: of the audit's examples.
      names: of its classes.

    Raises:
      UserError: for a file that cannot be read, and with the first line that cannot be used.
    """
    reader = read_exported(file, ("id", "mark", "label"))
    marks = {}
    for row in reader:
        where = f"--marks={file}, line {reader.line_num}"
        if not (row["id"] or "").isdecimal() or int(row["id"]) not in ids:
            raise UserError(f"{where}: id {row['id']!r} is none of this audit's; are the marks of another one?")
        if row["mark"] not in ACTIONS:
            raise UserError(f"{where}: mark {row['mark']!r}, expected one of {', '.join(ACTIONS)}")
        if row["mark"] == "relabel" and row["label"] not in names:
            raise UserError(f"{where}: label {row['label']!r} is no class of this audit")
        marks[int(row["id"])] = (row["mark"], row["label"])
    return marks
