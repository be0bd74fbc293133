"""A list to train on, of an audit: `python -m ieg_jax.clean --audit=audit --marks=marks.csv --out=cleaned.csv`.

Labels with P(right) below --threshold are relabelled or dropped, the others kept; a mark that was set in the page
decides for its example whatever P(right) is. The list has the columns path (absolute, where images are files), label,
given_label and id, and trains as any other: --config=configs/own_data.py --config.data.train=cleaned.csv.
"""

import csv
import io
import json
import os
import pathlib
from typing import Any

from absl import flags

from ieg_jax import cli
from ieg_jax.errors import StorageError, UserError, first_line

ACTIONS = ("keep", "relabel", "drop")


def write(
    audit: pathlib.Path, out: pathlib.Path, threshold: float = 0.5, below: str = "relabel", marks: str = ""
) -> dict[str, int]:
    """Writes the list.

    Args:
      audit: the folder that ieg_jax.audit wrote its tables to.
      out: the file, .csv.
      threshold: see above.
      below: relabel or drop.
      marks: marks.csv as the page exports it; "" = none.

    Returns:
      How many examples were kept, relabelled and dropped: keep, relabel, drop.

    Raises:
      UserError: where the audit or the marks cannot be read, or nothing would be left.
      StorageError: where the list cannot be written.
    """
    from ieg_jax.audit import BEGUN, TABLE

    if not (audit / TABLE).exists():
        raise UserError(f"{audit} has no {TABLE}, expected a folder that ieg_jax.audit wrote")
    from pyarrow import parquet

    base = json.loads((audit / BEGUN).read_text())["base"]
    columns = ["id", "path", "given_label", "suggested_label", "p_right"]
    rows = parquet.read_table(audit / TABLE, columns=columns).to_pylist()
    names = set(json.loads((audit / BEGUN).read_text())["class_names"])
    marked = read_marks(marks, {row["id"] for row in rows}, names) if marks else {}
    counts = dict.fromkeys(ACTIONS, 0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "given_label", "id"])
    for row in rows:
        usual = "keep" if row["p_right"] >= threshold else below
        action, label = marked.get(row["id"], (usual, row["suggested_label"]))
        counts[action] += 1
        if action != "drop":
            label = row["given_label"] if action == "keep" else label
            path = os.path.join(base, row["path"]) if base else row["path"]
            writer.writerow([path, label, row["given_label"], row["id"]])
    if counts["drop"] == len(rows):
        raise UserError(f"all {len(rows)} examples would be dropped; lower --threshold, or set fewer marks")
    partial = out.with_name(f"{out.name}.partial")
    try:
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        partial.replace(out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {first_line(error)}") from error
    return counts


def read_marks(file: str, ids: set[int], names: set[str]) -> dict[int, tuple[str, str]]:
    """Id -> (action, label) of the marks in a file.

    Args:
      file: with the columns id, mark and label.
      ids: of the audit's examples.
      names: of its classes.

    Raises:
      UserError: with the first line that cannot be used.
    """
    try:
        text = pathlib.Path(file).expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--marks={file}: cannot be read ({first_line(error)})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not {"id", "mark", "label"} <= set(reader.fieldnames or []):
        raise UserError(
            f"--marks={file}: columns {reader.fieldnames}, expected id, mark and label, as the page exports"
        )
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


def define_flags() -> None:
    """Defines the command's flags; not when it is imported, for other commands have flags of the same names."""
    flags.DEFINE_string("audit", None, "Folder that ieg_jax.audit wrote.", required=True)
    flags.DEFINE_string("out", None, "New .csv file; nothing is overwritten.", required=True)
    flags.DEFINE_float("threshold", 0.5, "Labels with P(right) below it are not kept.", lower_bound=0, upper_bound=1)
    flags.DEFINE_enum("below", "relabel", ["relabel", "drop"], "What becomes of these.")
    flags.DEFINE_string("marks", "", "marks.csv that the page exported.")


def main(argv: list[str]) -> None:
    """Writes the list, and says how many labels it changes."""
    del argv
    values: Any = flags.FLAGS
    out = pathlib.Path(values.out).expanduser()
    if out.suffix.lower() != ".csv":
        raise UserError(f"--out={values.out}: expected a name that ends in .csv")
    if out.exists():
        raise UserError(f"--out={out} is there already; name a new file")
    counts = write(pathlib.Path(values.audit).expanduser(), out, values.threshold, values.below, values.marks)
    print(f"{out}: {counts['keep']:,} labels kept, {counts['relabel']:,} changed, {counts['drop']:,} examples dropped")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
