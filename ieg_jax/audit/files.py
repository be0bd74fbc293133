"""The files of an audit, and its tables."""

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
    return {name: content[name] for name in ("labels", "pred_probs")}


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
    """Writes labels.parquet and labels.csv.

    Args:
      folder: of the audit.
      columns: name, one of COLUMNS -> `[N]`; None for a column of which the run knows nothing, which stays empty.
      probabilities: `[N, K]` of the classes, for labels.parquet.
      class_names: `[K]`, each once.
      spreadsheet: whether cells of labels.csv that a spreadsheet would take for formulas are made harmless.

    Raises:
      StorageError: where the files cannot be written.
    """

    def array(values: np.ndarray | None) -> pa.Array:
        if values is None:
            return pa.nulls(len(probabilities), pa.float32())
        if values.dtype == object:
            return pa.array([text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in values])
        return pa.array(values, from_pandas=True)  # nan, which means not known, becomes null

    table = pa.table({name: array(values) for name, values in columns.items()})
    whole = table
    if spreadsheet:
        texts = [name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)]
        for name in texts:
            cells = pa.array([files.inert(cell) for cell in table[name].to_pylist()], pa.string())
            table = table.set_column(table.column_names.index(name), name, cells)
    for number, name in enumerate(class_names):
        whole = whole.append_column(f"probability:{name}", pa.array(probabilities[:, number]))
    for name, write in ((TABLE, lambda file: parquet.write_table(whole, file)),
                        (TABLE_CSV, lambda file: pa_csv.write_csv(table, file))):  # fmt: skip
        buffer = io.BytesIO()
        write(buffer)
        files.write(folder / name, buffer.getvalue())
