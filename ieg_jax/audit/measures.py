"""Measures of predictions and estimates: divergence of views, reliability, and how good an audit is."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from ieg_jax import files
from ieg_jax.audit.noise_model import centred_logs, parts, softmax

BINS = 10  # of the reliability plot


def pooled(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """The geometric mean of the predictions of several networks, `[n, K]` each; float32, rows that sum to 1."""
    found = files.scratch(predictions[0].shape, np.float32)
    for rows in parts(*found.shape):
        found[rows] = softmax(sum(centred_logs(one[rows]) for one in predictions) / len(predictions))
    return found


def mean_over(first: Callable[..., np.ndarray], of_all: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """(split, view = None) -> `pooled` predictions of several networks; of a view, those of the first one alone.

    Args:
      first: `inference.predictor` of one.
      of_all: `inference.predictor_of_all`.
    """

    def predict(split: Any, view: int | None = None) -> np.ndarray:
        if view is not None:
            return first(split, view)
        found = of_all(split)
        return found[0] if len(found) == 1 else pooled(found)

    return predict


def divergence(probabilities: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence of V distributions (Lin 1991), H(mean) − mean H, divided by its largest value, log V.

    Args:
      probabilities: `[V, n, K]`.

    Returns:
      `[n]` float32 in [0, 1]; zeros where V is 1.
    """
    if len(probabilities) == 1:
        return np.zeros(probabilities.shape[1], np.float32)

    def entropy(p):
        return -np.sum(p * np.log(np.clip(p, 1e-12, None)), -1)

    values = entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)
    return np.clip(values / np.log(len(probabilities)), 0, 1).astype(np.float32)


def binned(
    predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, float, float]]:
    """(mean prediction, mean truth, weight) in each of BINS equal parts of [0, 1] that is not empty.

    Args:
      predicted: `[n]` probabilities.
      truth: `[n]` bool.
      weights: `[n]`; None = 1 each.
    """
    weights = np.ones(len(predicted)) if weights is None else weights
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    sums = [np.bincount(bins, values, BINS) for values in (weights * predicted, weights * truth, weights)]
    return [(float(p / w), float(t / w), float(w)) for p, t, w in zip(*sums, strict=True) if w > 1e-9]


def calibration_error(bins: list[tuple[float, float, float]]) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean distance between prediction and truth."""
    total = sum(weight for *_, weight in bins)
    return sum(abs(predicted - truth) * weight for predicted, truth, weight in bins) / total


def judge(right: np.ndarray, suggested: np.ndarray, given: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Judges estimates where the true labels are known.

    Args:
      right: `[n]` P(given label is right), or any score that is higher for labels that are right.
      suggested: `[n]`, what the label should be if it is wrong.
      given: `[n]`.
      true: `[n]`.

    Returns:
      `noise_rate`, the true one. Where there are wrong labels and right ones, also: `auroc`, the area under the ROC
      curve of `right`; `precision`, the share of wrong labels among those with the lowest `right`, as many as there are
      wrong ones; `suggested_right`, the share of the wrong labels whose suggestion is true.
    """
    wrong = given != true
    found = {"noise_rate": float(wrong.mean())}
    if 0 < wrong.sum() < len(wrong):
        first = np.argsort(right, kind="stable")[: wrong.sum()]
        found["auroc"] = float(roc_auc_score(wrong, -right))
        found["precision"] = float(wrong[first].mean())
        found["suggested_right"] = float((suggested == true)[wrong].mean())
    return found
