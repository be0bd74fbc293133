"""Writes a label audit as one HTML page, which needs no network and no server: opened as a file, it works.

The page shows how much of the labels is wrong, by class and by pair of classes, and the examples themselves, the most
suspicious first, to be marked keep, relabel or drop. Marks stay in the browser until they are exported as marks.csv.

Paths, names and texts come from data sets that nobody vouches for. They enter the page as JSON in a script element
that is not executed, its script makes nothing but text and attributes of them, and the page's Content-Security-Policy
admits that one script and nothing from elsewhere.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from ieg_jax.errors import StorageError, UserError, first_line

UNITS = 10_000  # numbers in the page are integers of 1/UNITS: half the size, and typed arrays in the browser
MATRIX_CLASSES = 30  # more than these are unreadable as a table; then the largest entries are listed
LISTED_PAIRS = 50
_SAFE_INTEGER = 2**53  # of JavaScript's numbers
# What would end a script element, begin a comment or a line in it, and what is no Unicode (of names that are no UTF-8).
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page shows; every text may hold anything.

    Attributes:
      title: of the data set or run.
      facts: name → value, about the run.
      class_names: `[K]`; classes of one name get their number before it.
      ids: `[N]` int64, each once.
      paths: `[N]`; what is no UTF-8 (surrogate escapes) is shown as U+FFFD, the id identifies the row.
      given: `[N]` int32, the class given, in [0, K).
      suggested: `[N]` int32, the class suggested, in [0, K).
      right: `[N]` float32, P(given label is right).
      confidence: `[N]` float32, P(suggested class).
      disagreement: `[N]` float32 in [0, 1], between augmented views.
      weight: `[N]` float32, mean ω relative to uniform over the last epochs, nan = unknown; None = the run has none.
      trust: `[N]` float32, mean λ, nan = unknown; None = the run has none.
      noise_rate: estimated share of wrong labels, nan = unknown.
      noise_interval: its 95 % interval.
      transition: `[K, K]` P(given = j | true = i), nan = unknown.
      calibration: a sentence or two: on what `right` was calibrated and how well, or that it was not.
      reliability: bins: mean `right`, observed share of right labels, number of examples; may be empty.
      thumbnails: row → data: URI of an image, of the most suspicious rows.
      key: identifies the audit: the browser keeps marks under it.
    """

    title: str
    facts: dict[str, str]
    class_names: tuple[str, ...]
    ids: np.ndarray
    paths: Sequence[str]
    given: np.ndarray
    suggested: np.ndarray
    right: np.ndarray
    confidence: np.ndarray
    disagreement: np.ndarray
    weight: np.ndarray | None
    trust: np.ndarray | None
    noise_rate: float
    noise_interval: tuple[float, float]
    transition: np.ndarray
    calibration: str
    reliability: Sequence[tuple[float, float, int]]
    thumbnails: Mapping[int, str]
    key: str


def write(page: Page, path: pathlib.Path) -> None:
    """Writes the page, whole or not at all; a file that is there already is replaced.

    Args:
      page: what it shows.
      path: of the .html file, in a folder that exists.

    Raises:
      UserError: for arrays whose lengths or values do not fit together.
      StorageError: where the file cannot be written.
    """
    check(page)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ieg_jax"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["sha256"] = _sha256
    text = environment.get_template("audit.html").render(data=to_json(content(page)))
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(text.encode("utf-8"))
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # it has its name by now, or there is no such folder
            partial.unlink()


def check(page: Page) -> None:
    """Compares the parts of a page.

    Raises:
      UserError: for lengths that differ, classes that are not there, probabilities outside [0, 1] and repeated ids.
    """
    count, classes = len(page.ids), len(page.class_names)
    for name in ("paths", "given", "suggested", "right", "confidence", "disagreement", "weight", "trust"):
        column = getattr(page, name)
        if column is not None and len(column) != count:
            raise UserError(f"audit page: {len(column)} {name}, expected one for each of the {count} ids")
    if np.shape(page.transition) != (classes, classes):
        raise UserError(
            f"audit page: transition of shape {np.shape(page.transition)}, expected ({classes}, {classes}), a row and "
            f"a column for each class name"
        )
    for name in ("given", "suggested"):
        column = np.asarray(getattr(page, name))
        wrong = (column < 0) | (column >= classes)
        if wrong.any():
            raise UserError(f"audit page: {name} has class {column[wrong][0]}, expected 0 to {classes - 1}")
    for name in ("right", "confidence", "disagreement"):
        column = np.asarray(getattr(page, name))
        wrong = ~((column >= -1e-4) & (column <= 1 + 1e-4))  # what sums of float32 leave over is let through
        if wrong.any():
            raise UserError(f"audit page: {name} has {column[wrong][0]}, expected values in [0, 1]")
    if len(np.unique(page.ids)) != count:
        raise UserError("audit page: an id stands for several rows, expected each once")


def content(page: Page) -> dict[str, Any]:
    """What the page's script reads: plain lists of integers and texts; -1 stands for an unknown number."""
    ids = np.asarray(page.ids).tolist()
    exact = all(-_SAFE_INTEGER <= number <= _SAFE_INTEGER for number in ids)
    classes = len(page.class_names)
    noise = map(float, (page.noise_rate, *page.noise_interval))
    return {
        "title": page.title,
        "facts": list(page.facts.items()),
        "names": distinct(page.class_names),
        "ids": ids if exact else list(map(str, ids)),
        "paths": list(page.paths),
        "given": np.asarray(page.given).tolist(),
        "suggested": np.asarray(page.suggested).tolist(),
        "right": _units(page.right, 1),
        "confidence": _units(page.confidence, 1),
        "disagreement": _units(page.disagreement, 1),
        "weight": None if page.weight is None else _units(page.weight),
        "trust": None if page.trust is None else _units(page.trust),
        "noise": [value if np.isfinite(value) else None for value in noise],
        "classes": class_table(page),
        "matrix": _units(page.transition) if classes <= MATRIX_CLASSES else None,
        "pairs": largest_pairs(page.transition) if classes > MATRIX_CLASSES else None,
        "calibration": page.calibration,
        "reliability": [
            [float(predicted), float(observed), int(number)]
            for predicted, observed, number in page.reliability
            if number and np.isfinite((predicted, observed)).all()
        ],
        "thumbnails": {str(int(row)): uri for row, uri in page.thumbnails.items()},
        "key": page.key,
    }


def class_table(page: Page) -> list[list[float]]:
    """What is known of each class.

    Returns:
      `[K]` lists: examples that were given it; of these estimated wrong, Σ (1 − right); examples that are of it, Σ
      right of these and Σ (1 − right) of those of other classes that it is suggested for; the class most suggested for
      those given it, by Σ (1 − right) (-1 = there is none; the lower of two as frequent), and that sum.
    """
    given, suggested = np.asarray(page.given), np.asarray(page.suggested)
    classes = len(page.class_names)
    right = np.asarray(page.right, np.float64)
    examples, wrong = np.bincount(given, minlength=classes), np.bincount(given, 1 - right, minlength=classes)
    other = given != suggested
    moved = np.zeros((classes, classes))
    np.add.at(moved, (given[other], suggested[other]), 1 - right[other])
    believed = np.bincount(given, right, minlength=classes) + moved.sum(0)
    frequency = moved.max(1)
    instead = np.where(frequency > 0, moved.argmax(1), -1)
    columns = (examples, wrong.round(4), believed.round(4), instead, frequency.round(4))
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def largest_pairs(transition: np.ndarray) -> list[list[int]]:
    """The largest entries off the diagonal, largest first: true class, class given, P in 1/UNITS; none of zero.

    Args:
      transition: `[K, K]` P(given = j | true = i), nan = unknown.
    """
    flat = np.nan_to_num(np.array(transition, np.float64))
    np.fill_diagonal(flat, 0)
    places = np.argsort(-flat, axis=None, kind="stable")[:LISTED_PAIRS]
    rows = [(*divmod(int(place), len(flat)), round(float(flat.flat[place]) * UNITS)) for place in places]
    return [list(row) for row in rows if row[2] > 0]


def to_json(found: Any) -> str:
    """JSON that can stand in a script element: whatever is in its texts, they do not end it.

    Args:
      found: lists, dicts, texts and finite numbers. Surrogates become U+FFFD.
    """
    plain = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: "\ufffd" if "\ud800" <= match[0] <= "\udfff" else f"\\u{ord(match[0]):04x}", plain)


def _units(values: np.ndarray, largest: float = np.inf) -> list:
    """Whole numbers of 1/UNITS, -1 where it is not known."""
    values = np.array(values, np.float64)
    known = np.isfinite(values)
    rounded = np.where(known, np.clip(np.where(known, values, 0), 0, largest) * UNITS, -1)
    return np.rint(rounded).astype(np.int64).tolist()


def distinct(names: Sequence[str]) -> list[str]:
    """The names, those that stand for several classes with the number of each, as `ieg_jax.predict` writes them."""
    shown = [_UNSAFE.sub(lambda match: "\ufffd" if match[0] >= "\ud800" else match[0], name) for name in names]
    seen: dict[str, int] = {}
    for name in shown:
        seen[name] = seen.get(name, 0) + 1
    return [f"{number} {name}" if seen[name] > 1 else name for number, name in enumerate(shown)]


def _sha256(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return base64.b64encode(hashlib.sha256(str(text).encode("utf-8")).digest()).decode("ascii")
