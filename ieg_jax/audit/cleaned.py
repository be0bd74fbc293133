"""Writes cleaned.csv and its kin: the labels of a run, of which the wrong ones are replaced or left out."""

import csv
import io
import json
import os

import numpy as np
from etils import epath

from ieg_jax import files
from ieg_jax.audit.files import BEGUN, SUMMARY, TABLE, read_exported
from ieg_jax.data.sources import feature_tables
from ieg_jax.data.splits import in_lines
from ieg_jax.errors import UserError, first_line

ACTIONS = ("keep", "relabel", "drop")


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
    columns = ["id", "path", "given_label", "suggested_label", "p_right"]
    rows = files.read_parquet((audit / TABLE).read_bytes(), columns).to_pylist()
    marked = read_marks(marks, {row["id"] for row in rows}, names) if marks else {}
    counts, kept = dict.fromkeys(ACTIONS, 0), []
    for row in rows:
        usual = "keep" if row["p_right"] >= threshold else below
        action, label = marked.get(row["id"], (usual, row["suggested_label"]))
        counts[action] += 1
        if action != "drop":
            kept.append((row, row["given_label"] if action == "keep" else label))
    if not kept:
        raise UserError(f"all {len(rows)} examples would be dropped; lower --threshold, or set fewer marks")
    file = epath.Path(begun.get("arrays", ""))
    if out.suffix in (".npz", *feature_tables.ENDINGS):
        if file.suffix.lower() != out.suffix.lower():
            expected = f".csv or {file.suffix}" if file.suffix else ".csv"
            raise UserError(f"{out}: the data of this audit are no {out.suffix} file; expected a name in {expected}")
        dropped = np.setdiff1d([row["id"] for row in rows], [row["id"] for row, _ in kept])
        labels = {row["id"]: label for row, label in kept}
        if out.suffix == ".npz":
            classes = {name: number for number, name in enumerate(begun["class_names"])}
            labels = {row: classes[label] for row, label in labels.items()}
            files.write_arrays(out, _arrays(file, labels, dropped), compressed=False)
        else:
            feature_tables.rewrite(file, out, labels, dropped)
        return counts
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "given_label", "id"])
    for row, label in kept:
        path = os.path.join(base, row["path"]) if base else row["path"]
        writer.writerow([path, label, row["given_label"], row["id"]])
    files.write(out, text.getvalue())
    return counts


def _arrays(file: epath.Path, labels: dict[int, int], dropped: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the .npz file that a run was trained on, cleaned.

    Args:
      file: its path.
      labels: id, the place in the file -> label.
      dropped: ids.
    """
    try:
        arrays = files.read_arrays(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); it has to be where it was") from None
    # Examples that the run took out as trusted are in the file still, and keep their labels.
    arrays["labels"][list(labels)] = list(labels.values())
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
