"""A checked sample: training examples drawn at random in the page of an audit, and what a person said of them.

The page draws so many at random, alike or from each tenth of P(right) alike often (then with weights), shows them one
after the other, and exports the answers as sample.csv, with the columns id, answer, label and weight. From these the
noise rate follows without any network, and with `ieg_jax.audit --marks` they are the pairs that everything is
estimated from anew. Marks that a person set while looking through the most suspicious examples are no such sample.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ieg_jax.audit.files import read_exported
from ieg_jax.audit.quality import NO_CLASS, Quality, clopper_pearson
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError

COLUMNS = ("id", "answer", "label", "weight")
RIGHT, WRONG = "right", "wrong"  # answers; a wrong one may say which label is right


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was said of M examples.

    Attributes:
      rows: `[M]` of the training set.
      labels: `[M]` int, their true labels; NO_CLASS for wrong ones of which the person did not say what they are.
      right: `[M]` bool.
      weights: `[M]`, how many examples each stands for.
    """

    rows: np.ndarray
    labels: np.ndarray
    right: np.ndarray
    weights: np.ndarray


def read(file: str, ids: np.ndarray, class_names: Sequence[str]) -> Answers:
    """Reads sample.csv.

    Args:
      file: as the page exports it.
      ids: `[N]` of the training set.
      class_names: of the audit.

    Raises:
      UserError: for a file that cannot be read, and with the first line that cannot be used.
    """
    reader = read_exported(file, COLUMNS)
    row_of = {int(number): row for row, number in enumerate(ids)}
    number_of = {name: number for number, name in enumerate(class_names)}
    found: dict[int, tuple[int, bool, float]] = {}
    for line in reader:
        where = f"--marks={file}, line {reader.line_num}"
        if not (line["id"] or "").isdecimal() or int(line["id"]) not in row_of:
            raise UserError(f"{where}: id {line['id']!r} is no training example's; is the sample of another audit?")
        if line["answer"] not in (RIGHT, WRONG):
            raise UserError(f"{where}: answer {line['answer']!r}, expected {RIGHT} or {WRONG}")
        if line["label"] and line["label"] not in number_of:
            raise UserError(f"{where}: label {line['label']!r} is no class of this audit")
        try:
            weight = float(line["weight"])
        except (TypeError, ValueError):
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"{where}: weight {line['weight']!r}, expected a number above 0")
        found[row_of[int(line["id"])]] = (number_of.get(line["label"], NO_CLASS), line["answer"] == RIGHT, weight)
    if not found:
        raise UserError(f"--marks={file}: holds no answers")
    labels, right, weights = (np.array(column) for column in zip(*found.values(), strict=True))
    return Answers(np.array(list(found)), labels, right, weights)


def as_evidence(answers: Answers, labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, ...]:
    """The answers as what `quality.estimate` takes for held-out examples, with their weights.

    Args:
      answers: of training examples.
      labels: `[N]` of the training set, as given.
      probabilities: `[N, K]` of the training set.
    """
    given = labels[answers.rows]
    true = np.where(answers.right, given, answers.labels)
    return probabilities[answers.rows], true, given, answers.weights


def report(answers: Answers, quality: Quality) -> dict[str, Any]:
    """What the sample says by itself.

    Args:
      answers: of training examples.
      quality: the estimates, of which the suggestions are judged.

    Returns:
      `checked`; `noise_rate` and its exact 95 % interval `noise_interval`; and, of the wrong ones whose true label is
      known, how many there are (`relabelled`) and for which share the suggestion is right (`suggested_right`).
    """
    share = float(np.average(~answers.right, weights=answers.weights))
    effective = float(answers.weights.sum() ** 2 / (answers.weights**2).sum())
    told = ~answers.right & (answers.labels != NO_CLASS)
    suggested = quality.suggested[answers.rows[told]] == answers.labels[told]
    return {
        "checked": len(answers.rows),
        "noise_rate": share,
        "noise_interval": list(clopper_pearson(share, effective)),
        "relabelled": int(told.sum()),
        "suggested_right": float(suggested.mean()) if told.any() else None,
    }


def fingerprint(held_out: Split | None, marks: str) -> str:
    """A hash of what the estimates are made with besides the training set; "" where there is nothing."""
    digest = hashlib.sha256()
    if held_out is not None:
        digest.update(held_out.given_labels.tobytes())
    file = epath.Path(marks).expanduser()
    if marks and file.is_file():
        digest.update(file.read_bytes())
    return digest.hexdigest() if held_out is not None or marks else ""
