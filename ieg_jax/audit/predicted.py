"""The predictions of a training set, which an audit rests on: made piece by piece, by one process or by several.

Each piece is saved in the folder `parts/` of the audit when it is finished. So an audit that was interrupted goes on
with the next one, and pieces can be made on several machines that share the folder.
"""

import zipfile
from collections.abc import Callable

import numpy as np
from etils import epath
from rich.progress import track

from ieg_jax import files
from ieg_jax.audit import measures
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError

AT_ONCE = 4096  # examples that are predicted before the predictions are saved

Predict = Callable[..., np.ndarray]  # see `inference.predictor`


def training_set(
    folder: epath.Path, predict: Predict, train: Split, views: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[N, K]` and disagreement `[N]` of the training set, float32, see `files.scratch`.

    Pieces that are there are read, and the others are made.

    Args:
      folder: of the audit.
      predict: of (split, view = None).
      train: the training set.
      views: augmented views of each example that are compared.
      num_classes: K.

    Raises:
      StorageError: where there is no room.
    """
    probabilities = files.scratch((len(train), num_classes), np.float32)
    disagreement = np.empty(len(train), np.float32)
    starts = range(0, len(train), AT_ONCE)
    for start in track(starts, "predicting", transient=True, disable=len(starts) < 2):
        rows = slice(start, min(start + AT_ONCE, len(train)))
        content = _read(folder, start, (rows.stop - start, num_classes))
        content = _make(folder, predict, train, views, start) if content is None else content
        probabilities[rows], disagreement[rows] = content["probabilities"], content["disagreement"]
    return probabilities, disagreement


def share(folder: epath.Path, predict: Predict, train: Split, views: int, part: tuple[int, int]) -> slice:
    """Makes the pieces of one part of the training set that are not there; see `training_set`.

    Args:
      folder: of the audit.
      predict: of (split, view = None).
      train: the training set.
      views: augmented views of each example that are compared.
      part: (i, n), the i-th of n parts, from 1.

    Returns:
      The rows of the part.
    """
    starts = rows_of(len(train), part)
    for start in track(starts, "predicting", transient=True, disable=len(starts) < 2):
        if not _place(folder, start).exists():
            _make(folder, predict, train, views, start)
    return slice(starts.start, min(starts.stop, len(train)))


def rows_of(count: int, part: tuple[int, int]) -> range:
    """The first rows of the pieces of a part, of `count` examples; each piece is in one part of n, whatever n is."""
    number, total = part
    pieces = -(-count // AT_ONCE)
    return range(pieces * (number - 1) // total * AT_ONCE, pieces * number // total * AT_ONCE, AT_ONCE)


def parse_part(text: str) -> tuple[int, int]:
    """(3, 16) of "3/16".

    Raises:
      UserError: for anything else than a part of several.
    """
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise UserError(f"--part={text}: expected i/n, the i-th of n parts, such as 1/16 to 16/16")
    return int(number), int(total)


def _place(folder: epath.Path, start: int) -> epath.Path:
    """The file of the piece that begins with this row."""
    return folder / "parts" / f"{start:09d}.npz"


def _make(folder: epath.Path, predict: Predict, train: Split, views: int, start: int) -> dict[str, np.ndarray]:
    """Predicts a piece, and saves it."""
    split = train.take(np.arange(start, min(start + AT_ONCE, len(train))))
    each = np.stack([predict(split, view) for view in (None, *range(views))])
    content = {"probabilities": each[0], "disagreement": measures.divergence(each)}
    (folder / "parts").mkdir(exist_ok=True)
    files.write_arrays(_place(folder, start), content, compressed=False)
    return content


def _read(folder: epath.Path, start: int, shape: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """What was saved of a piece; None where it is not finished, or was damaged since."""
    file = _place(folder, start)
    if not file.exists():
        return None
    try:
        content = files.read_arrays(file)
        return content if content["probabilities"].shape == shape and len(content["disagreement"]) == shape[0] else None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
