"""Writes a label audit as one HTML page, which needs no network and no server: it works when opened as a file.

The page shows how many labels are wrong, by class and by pair of classes, and the examples themselves, the most
suspicious first, to be marked keep, relabel or drop. Marks stay in the browser until they are exported as marks.csv.

Paths, names and texts come from data sets that nobody vouches for. They enter the page as JSON in a script element
that is not executed, its script makes nothing but text and attributes of them, and the page's Content-Security-Policy
admits that one script and nothing from elsewhere.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from ieg_jax import files
from ieg_jax.audit.files import BEGUN, PAGE
from ieg_jax.audit.quality import Quality
from ieg_jax.data import splits
from ieg_jax.data.load import Data
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError
from ieg_jax.inference import Trained

THUMBNAIL = 96  # pixels of the longer side, at most
LONGEST_TEXT = 1_000  # characters of an example that are shown
UNITS = 10_000  # numbers in the page are integers of 1/UNITS: half the size, and typed arrays in the browser
MATRIX_CLASSES = 30  # a matrix of more classes is unreadable as a table; then the largest entries are listed
LISTED_PAIRS = 50
LISTED = 100_000  # examples in the page, the most suspicious ones; those to be checked come on top
BINS = 20  # of the histogram of P(right)
SAMPLE, STRATA = 100, 10  # examples that a person is asked about, and parts of P(right) that they are drawn from
# Characters that would end a script element, or begin a comment or a line in it, and surrogates, which are no Unicode.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_SAFE_INTEGER = 2**53  # up to here JavaScript's numbers are exact integers


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page shows; every text may hold anything.

    Attributes:
      title: of the data set or run.
      facts: name → value, about the run.
      class_names: `[K]`; classes of one name get their number before it.
      ids: `[N]` int64, each once.
      paths: `[N]`; what is no UTF-8 (surrogate escapes) is shown as U+FFFD, so a row is identified by its id.
      given: `[N]` int32, the class given, in [0, K).
      suggested: `[N]` int32, the class suggested, in [0, K).
      right: `[N]` float32, P(given label is right).
      confidence: `[N]` float32, P(suggested class).
      disagreement: `[N]` float32 in [0, 1], between augmented views.
      weight: `[N]` float32, mean ω relative to uniform over the last epochs, nan = unknown; None = the run has none.
      trust: `[N]` float32, mean λ, nan = unknown; None = the run has none.
      noise_rate: estimated share of wrong labels, nan = unknown.
      noise_interval: the 95 % interval of `noise_rate`.
      transition: `[K, K]` P(given = j | true = i), nan = unknown.
      calibration: a sentence or two that say on what `right` was calibrated and how well, or that it was not.
      reliability: for each bin: mean `right`, observed share of right labels, number of examples; may be empty.
      alarms: sentences, why the estimates should not be relied on.
      sample: `random` and `stratified` → (row, weight) of each example that a person is asked about, see `draw_sample`.
      thumbnails: row → data: URI of its image, for the most suspicious rows.
      texts: row → the text of an example that is no image, likewise.
      key: identifies the audit; the browser keeps marks under it.
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
    alarms: Sequence[str]
    sample: Mapping[str, Sequence[tuple[int, float]]]
    thumbnails: Mapping[int, str]
    texts: Mapping[int, str]
    key: str


def write(page: Page, path: epath.Path) -> None:
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
        loader=jinja2.PackageLoader("ieg_jax.audit"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["sha256"] = _sha256
    text = environment.get_template("audit.html").render(data=to_json(content(page)))
    files.write(path, text)


def check(page: Page) -> None:
    """Checks that the parts of a page fit together.

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
        wrong = ~((column >= -1e-4) & (column <= 1 + 1e-4))  # sums in float32 may be off by a little
        if wrong.any():
            raise UserError(f"audit page: {name} has {column[wrong][0]}, expected values in [0, 1]")
    if len(np.unique(page.ids)) != count:
        raise UserError("audit page: an id stands for several rows, expected each once")


def content(page: Page) -> dict[str, Any]:
    """What the page's script reads: plain lists of integers and texts; -1 stands for an unknown number.

    Of more than LISTED examples it has the most suspicious ones and those of the sample, so that a browser can open it
    however many there are; what is said of all of them, as of the classes, is counted here.
    """
    rows = listed(page)
    place = {int(row): number for number, row in enumerate(rows)}

    def moved(by_row: Mapping[int, str]) -> dict[str, str]:
        return {str(place[row]): value for row, value in by_row.items() if row in place}

    ids = np.asarray(page.ids)[rows].tolist()
    exact = all(-_SAFE_INTEGER <= number <= _SAFE_INTEGER for number in ids)
    classes = len(page.class_names)
    noise = map(float, (page.noise_rate, *page.noise_interval))
    right = _units(page.right, 1)
    histogram = np.bincount(np.minimum(right * BINS // UNITS, BINS - 1)[right >= 0], minlength=BINS)

    def units(column: np.ndarray | None, largest: float = np.inf) -> list | None:
        return None if column is None else _units(np.asarray(column)[rows], largest).tolist()

    return {
        "title": page.title,
        "facts": list(page.facts.items()),
        "names": splits.distinct(page.class_names),
        "count": len(page.ids),
        "histogram": histogram.tolist(),
        "ids": ids if exact else list(map(str, ids)),
        "paths": [page.paths[row] for row in rows],
        "given": np.asarray(page.given)[rows].tolist(),
        "suggested": np.asarray(page.suggested)[rows].tolist(),
        "right": right[rows].tolist(),
        "confidence": units(page.confidence, 1),
        "disagreement": units(page.disagreement, 1),
        "weight": units(page.weight),
        "trust": units(page.trust),
        "noise": [value if np.isfinite(value) else None for value in noise],
        "classes": class_table(page),
        "matrix": _units(page.transition).tolist() if classes <= MATRIX_CLASSES else None,
        "pairs": largest_pairs(page.transition) if classes > MATRIX_CLASSES else None,
        "calibration": page.calibration,
        "alarms": list(page.alarms),
        "sample": {
            name: [[place[row], float(weight)] for row, weight in drawn if row in place]
            for name, drawn in page.sample.items()
        },
        "reliability": [
            [float(predicted), float(observed), int(number)]
            for predicted, observed, number in page.reliability
            if number and np.isfinite((predicted, observed)).all()
        ],
        "thumbnails": moved(page.thumbnails),
        "texts": moved(page.texts),
        "key": page.key,
    }


def listed(page: Page) -> np.ndarray:
    """The rows that the page lists, `[n]` int, ascending: all, or the most suspicious and those that show more."""
    count = len(page.ids)
    if count <= LISTED:
        return np.arange(count)
    asked = [row for drawn in page.sample.values() for row, _ in drawn]
    shown = [*asked, *page.thumbnails, *page.texts]
    return np.unique(np.concatenate([np.argsort(page.right, kind="stable")[:LISTED], np.array(shown, int)]))


def class_table(page: Page) -> list[list[float]]:
    """What is known of each class.

    Returns:
      `[K]` lists of five numbers: how many examples were given the class; how many of these are estimated to be wrong,
      Σ (1 − right); how many examples are estimated to be of the class, Σ right over those that were given it plus
      Σ (1 − right) over those that were given another and have it suggested; the other class that is suggested most for
      those that were given it, by Σ (1 − right) (-1 = there is none; of two equal ones the lower); and that sum.
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
    """The largest entries off the diagonal, the largest first: true class, class given, P in 1/UNITS; without zeros.

    Args:
      transition: `[K, K]` P(given = j | true = i), nan = unknown.
    """
    flat = np.nan_to_num(np.array(transition, np.float64))
    np.fill_diagonal(flat, 0)
    places = np.argsort(-flat, axis=None, kind="stable")[:LISTED_PAIRS]
    rows = [(*divmod(int(place), len(flat)), round(float(flat.flat[place]) * UNITS)) for place in places]
    return [list(row) for row in rows if row[2] > 0]


def to_json(found: Any) -> str:
    """JSON that can stand in a script element, which no text in it can end.

    Args:
      found: lists, dicts, texts and finite numbers. Surrogates become U+FFFD.
    """
    plain = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda match: "\ufffd" if "\ud800" <= match[0] <= "\udfff" else f"\\u{ord(match[0]):04x}", plain)


def _units(values: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """Values as whole numbers of 1/UNITS, int64, clipped to [0, `largest`]; -1 where they are not known."""
    values = np.array(values, np.float64)
    known = np.isfinite(values)
    rounded = np.where(known, np.clip(np.where(known, values, 0), 0, largest) * UNITS, -1)
    return np.rint(rounded).astype(np.int64)


def _sha256(text: str) -> str:
    """The hash by which a Content-Security-Policy names an inline script or style."""
    return base64.b64encode(hashlib.sha256(str(text).encode("utf-8")).digest()).decode("ascii")


def calibration_text(summary: dict[str, Any]) -> str:
    """Says on what P(right) was calibrated and how well, for a person to read; `summary` is that in summary.json."""
    accuracy = summary["held_out_accuracy"]
    basis = summary["noise_interval_rests_on"]
    if summary["pairs"]:
        text = f"P(right) and the noise rate rest on {summary['pairs']} checked examples whose given label is known too"
        if basis == "memorised":
            text = f"The noise rate is that among {summary['pairs']} checked examples whose given label is known too"
        error = summary["calibration_error"]
        if error is None:
            return f"{text}; with fewer than 20 of these nothing can be said about how far off P(right) is."
        return f"{text}. Of these, each judged by an estimate without it, P(right) is off by {error:.3f} on average."
    if basis == "held_out":
        return (
            f"P(right) rests on the noise model and on {summary['held_out']} trusted examples that were held out of "
            f"training (accuracy {accuracy:.0%}); whether wrong labels depend on the image they cannot show, so the "
            f"interval allows for it. Check a random sample, or keep the given labels of trusted examples "
            f"(given_label), to narrow it."
        )
    return (
        "P(right) rests on the network alone: no trusted example was held out of training (trusted.holdout). The order "
        "of the examples is as good as it would be; the probabilities and the noise rate may be off, and the interval "
        "is wide. Check a random sample to narrow it."
    )


def write_page(
    folder: epath.Path,
    trained: Trained,
    data: Data,
    quality: Quality,
    disagreement: np.ndarray,
    columns: dict[str, np.ndarray | None],
    summary: dict[str, Any],
    thumbnails: int,
) -> None:
    """Writes audit.html of an audit.

    Args:
      folder: of the audit.
      trained: the run's network.
      data: those of the run.
      quality: the estimates for `data.train`.
      disagreement: `[N]` in [0, 1], between augmented views.
      columns: those of the tables; mean_weight and mean_trust are shown.
      summary: the contents of summary.json.
      thumbnails: how many of the most suspicious images, or texts, are shown.

    Raises:
      UserError, StorageError: see `write`.
    """
    config = trained.config
    facts = {
        "method": config.method.name,
        "network": config.model.name,
        "step": f"{trained.step:,}",
        "judged by": summary["judged_by"],
        "trusted examples": f"{len(data.trusted):,}",
        "date": datetime.date.today().isoformat(),
    }
    key = hashlib.sha256((folder / BEGUN).read_bytes()).hexdigest()[:16]
    drawn = draw_sample(quality.right, int(key, 16))
    pictures, texts = _previews(data.train, quality.right, thumbnails, drawn)
    page = Page(
        title=data.name,
        facts=facts,
        class_names=tuple(trained.class_names),
        ids=data.train.ids,
        paths=data.train.names,
        given=data.train.labels,
        suggested=quality.suggested,
        right=quality.right,
        confidence=quality.confidence,
        disagreement=disagreement,
        weight=columns["mean_weight"],
        trust=columns["mean_trust"],
        noise_rate=quality.noise_rate,
        noise_interval=quality.noise_interval,
        transition=quality.transition,
        calibration=calibration_text(summary),
        reliability=quality.reliability,
        alarms=summary["alarms"],
        sample=drawn,
        thumbnails=pictures,
        texts=texts,
        key=key,
    )
    write(page, folder / PAGE)


def draw_sample(right: np.ndarray, seed: int) -> dict[str, list[tuple[int, float]]]:
    """Draws the examples that a person is asked about, at most SAMPLE each.

    Args:
      right: `[N]` P(given label is right).
      seed: one audit, one sample.

    Returns:
      `random`: (row, 1), each example alike often. `stratified`: (row, weight), from each tenth of P(right) as many as
      from the others, with the number of examples that each stands for, so that weighted means are those of all.
    """
    rng = np.random.default_rng(seed)
    stratum = np.minimum((right * STRATA).astype(int), STRATA - 1)
    stratified = []
    for number in range(STRATA):
        rows = np.flatnonzero(stratum == number)
        chosen = rng.permutation(rows)[: SAMPLE // STRATA]
        stratified += [(int(row), len(rows) / len(chosen)) for row in chosen]
    order = rng.permutation(len(stratified))
    return {
        "random": [(int(row), 1.0) for row in rng.permutation(len(right))[:SAMPLE]],
        "stratified": [stratified[place] for place in order],
    }


def _previews(
    split: Split, right: np.ndarray, count: int, drawn: Mapping[str, Sequence[tuple[int, float]]]
) -> tuple[dict[int, str], dict[int, str]]:
    """What is shown of the `count` rows that are least likely right, and of those of the sample.

    Returns:
      Row -> data: URI of its image; row -> its text. A row has one of them, or none.
    """
    if not count:
        return {}, {}
    asked = [row for rows in drawn.values() for row, _ in rows]
    rows = np.unique(np.concatenate([np.argsort(right, kind="stable")[:count], np.array(asked, int)]))
    if split.is_visible:
        return {int(row): thumbnail(image) for row, image in zip(rows, split.originals(rows), strict=True)}, {}
    if split.previews is None:
        return {}, {}
    shown = {int(row): split.previews[row] for row in rows if split.previews[row]}
    pictures = {}
    for row, path in shown.items():
        if isinstance(path, pathlib.Path):
            # A picture that is gone or damaged is one preview less: it was not trained on.
            with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(path) as image:
                pictures[row] = thumbnail(np.asarray(image.convert("RGB")))
    return pictures, {row: text[:LONGEST_TEXT] for row, text in shown.items() if isinstance(text, str)}


def thumbnail(image: np.ndarray) -> str:
    """A data: URI of an image `[H, W, 1 or 3]` uint8, made smaller where a side is longer than THUMBNAIL."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    small = max(picture.size) <= THUMBNAIL // 2
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
