"""The files of an audit, and its tables."""

import contextlib
import csv
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from pyarrow import csv as pa_csv
from pyarrow import parquet

from ieg_jax import files
from ieg_jax.errors import UserError, first_line

# The columns of the tables, with their meanings.
COLUMNS = {
    "id": "of the example, the same in every run",
    "path": "of the image, as the data name it",
    "given_label": "name of the class that was given",
    "suggested_label": "the most probable class but for the given one: what the label should be if it is wrong",
    "p_right": "P(given label is right), see ieg_jax.audit.quality",
    "p_suggested": "P(the suggested class is the true one)",
    "disagreement": "between augmented views of the image: Jensen–Shannon divergence of their predictions, 0 to 1",
    "mean_weight": "ω relative to uniform over the last audit.epochs of training; empty where the run has none",
    "mean_trust": "λ over the same epochs; empty likewise",
    "self_confidence": "of features, and with --folds: P(given label) by a classifier trained without the example",
}
TABLE, TABLE_CSV, PAGE, CLEANED, CLEANLAB, SUMMARY = (
    "labels.parquet", "labels.csv", "audit.html", "cleaned.csv", "cleanlab.npz", "summary.json",
)  # fmt: skip
CLEANED_DATA = "cleaned"  # with the ending of data.train, of data that were an .npz file or a table of features
CLASSIFIER = "classifier.joblib"  # of features: the final classifier, see `inference.plain`
GROUP_ROWS, GROUP_NUMBERS = 2**17, 2**24  # of a row group of labels.parquet, at most: what is in memory at once
BEGUN = "audit.json"  # what an audit was begun with, by which the same command knows it again


def to_cleanlab(folder: str) -> dict[str, np.ndarray]:
    """The labels and probabilities of an audit as cleanlab takes them.

        from cleanlab.filter import find_label_issues
        issues = find_label_issues(**to_cleanlab("audit"), return_indices_ranked_by="self_confidence")

    With --folds the probabilities are out of fold, as cleanlab wants them. Without it they are those of the network
    that was trained with these labels, which is surer of them than cleanlab assumes.

    Args:
      folder: the folder that ieg_jax.audit wrote.

    Returns:
      labels: `[N]` int64, as given, in the order of labels.parquet.
      pred_probs: `[N, K]` float64, rows that sum to 1.
    """
    content = files.read_arrays(epath.Path(folder) / CLEANLAB)
    probabilities = content["pred_probs"].astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)
    return {"labels": content["labels"], "pred_probs": probabilities}


def write_cleanlab(folder: epath.Path, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Writes cleanlab.npz, see `to_cleanlab`: `labels` `[N]` int64 and `pred_probs` `[N, K]` float32 as predicted.

    Raises:
      StorageError: where it cannot be written.
    """
    content = {"labels": labels.astype(np.int64), "pred_probs": probabilities}
    files.write_arrays(folder / CLEANLAB, content, compressed=False)


def read_exported(file: str, columns: Sequence[str]) -> csv.DictReader:
    """The rows of a .csv file that the page exported, with these columns at least.

    Raises:
      UserError: for a file that cannot be read, or lacks a column.
    """
    try:
        text = epath.Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--marks={file}: cannot be read ({first_line(error)})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if not set(columns) <= set(reader.fieldnames or []):
        raise UserError(
            f"--marks={file}: columns {reader.fieldnames}, expected {', '.join(columns)}, as the page exports: "
            f"marks.csv for ieg_jax.clean, sample.csv for ieg_jax.audit"
        )
    return reader


def write_tables(
    folder: epath.Path,
    columns: dict[str, np.ndarray | None],
    probabilities: np.ndarray,
    class_names: Sequence[str],
    spreadsheet: bool = False,
) -> None:
    """Writes labels.parquet and labels.csv, some rows at a time.

    Args:
      folder: of the audit.
      columns: name, one of COLUMNS -> `[N]`; None for a column of which the run knows nothing, which stays empty.
      probabilities: `[N, K]` of the classes, for labels.parquet.
      class_names: `[K]`, each once.
      spreadsheet: whether cells of labels.csv that a spreadsheet would take for formulas are made harmless.

    Raises:
      StorageError: where the files cannot be written.
    """
    count, classes = probabilities.shape
    texts = [name for name, values in columns.items() if values is not None and values.dtype == object]

    def tables(rows: slice) -> tuple[pa.Table, pa.Table]:
        """These rows of labels.parquet and of labels.csv."""
        table = pa.table({name: _array(values, rows, count) for name, values in columns.items()})
        whole = table
        for name in texts if spreadsheet else ():
            cells = pa.array([files.inert(cell) for cell in table[name].to_pylist()], pa.string())
            table = table.set_column(table.column_names.index(name), name, cells)
        each = np.ascontiguousarray(probabilities[rows].T)
        added = {f"probability:{name}": pa.array(each[number]) for number, name in enumerate(class_names)}
        return pa.table({**{name: whole[name] for name in whole.column_names}, **added}), table

    size = max(1, min(GROUP_ROWS, GROUP_NUMBERS // (classes + len(columns))))
    schemas = [table.schema for table in tables(slice(0, 1))]
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(files.complete_or_absent(folder / name)) for name in (TABLE, TABLE_CSV)]
        streams = [stack.enter_context(place.open("wb")) for place in places]
        # Numbers that hardly ever occur twice are not worth a dictionary.
        writers = (
            stack.enter_context(parquet.ParquetWriter(streams[0], schemas[0], use_dictionary=texts)),
            stack.enter_context(pa_csv.CSVWriter(streams[1], schemas[1])),
        )
        for start in range(0, count, size):
            for writer, table in zip(writers, tables(slice(start, min(start + size, count))), strict=True):
                writer.write_table(table)


def _array(values: np.ndarray | None, rows: slice, count: int) -> pa.Array:
    """These rows of a column of `count` ones."""
    if values is None:
        return pa.nulls(len(range(*rows.indices(count))), pa.float32())
    if values.dtype == object:
        return pa.array([text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in values[rows]])
    return pa.array(values[rows], from_pandas=True)  # nan, which means not known, becomes null
