"""Files of labels and of transition matrices."""

import io
import json

import numpy as np
from etils import epath

from ieg_jax import files
from ieg_jax.errors import UserError


def write_labels(path: epath.PathLike, labels: np.ndarray) -> None:
    """Writes labels for `noise.kind=file`.

    Args:
      path: new file; .json makes a list of integers, as DivideMix has it, .npy an array.
      labels: `[N]` integers, in ascending order of ids.

    Raises:
      UserError: for another suffix, and where the file exists.
    """
    file, labels = epath.Path(path).expanduser(), np.asarray(labels)
    if file.suffix not in (".json", ".npy"):
        raise UserError(f"{path}: expected a name that ends in .json or .npy")
    if file.exists():
        raise UserError(f"{path} exists and is not overwritten; give another name or remove it")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"labels of shape {labels.shape} and dtype {labels.dtype}, expected [N] integers")
    if file.suffix == ".json":
        files.write(file, json.dumps(labels.tolist()))
    else:
        content = io.BytesIO()
        np.save(content, labels)
        files.write(file, content.getvalue())


def read_labels(path: epath.PathLike) -> np.ndarray:
    """Reads labels that `write_labels` or DivideMix wrote: `[N]` integers.

    Raises:
      UserError: for a file that is missing, damaged, or holds anything else.
    """
    labels = _read_array(path)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise UserError(
            f"noise.file={str(path)!r}: shape {labels.shape}, dtype {labels.dtype}; expected a list of integers, "
            f"one label for each training example"
        )
    return labels


def read_matrix(path: epath.PathLike, num_classes: int) -> np.ndarray:
    """Reads a transition matrix, .json (a list of rows) or .npy: `[K, K]` float64, rows of probabilities.

    Raises:
      UserError: for a file that is missing, damaged, or holds anything else, such as rows that do not sum to 1.
    """
    matrix, where = _read_array(path), f"noise.file={str(path)!r}"
    if matrix.shape != (num_classes, num_classes) or matrix.dtype.kind not in "iuf":
        raise UserError(
            f"{where}: shape {matrix.shape}, dtype {matrix.dtype}; expected {num_classes}×{num_classes} numbers, "
            f"row = true class, column = given label"
        )
    matrix = matrix.astype(np.float64)
    bad = np.flatnonzero(~((matrix >= 0).all(1) & (np.abs(matrix.sum(1) - 1) < 1e-6)))  # nan counts as bad
    if len(bad):
        raise UserError(
            f"{where}: row {bad[0]} is {np.array2string(matrix[bad[0]], threshold=8)} with sum "
            f"{matrix[bad[0]].sum():g}, expected probabilities that sum to 1"
        )
    return matrix


def _read_array(path: epath.PathLike) -> np.ndarray:
    file, where = epath.Path(path).expanduser(), f"noise.file={str(path)!r}"
    if file.suffix not in (".json", ".npy"):
        raise UserError(f"{where}: expected a file that ends in .json or .npy")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error})") from None
    try:
        values = json.loads(content) if file.suffix == ".json" else np.load(io.BytesIO(content), allow_pickle=False)
        array = np.asarray(values)
    except (ValueError, EOFError, OSError) as error:  # numpy raises ValueError for rows of various lengths
        raise UserError(f"{where}: damaged, or not of numbers alone ({error}); is the file complete?") from None
    return array
