"""Accuracy while a run goes on and at its end."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ieg_jax.data.splits import UNKNOWN, Split
from ieg_jax.runtime.workdir import RATE, rank
from ieg_jax.train import metrics
from ieg_jax.train.look import Look
from ieg_jax.train.step import TrainState

METRICS = ("accuracy", "balanced_accuracy", "top5_accuracy")  # what `step.eval_step` measures


def evaluate(
    state: TrainState,
    evaluations: dict[str, Iterable[dict[str, jax.Array]]],
    eval_step: Callable[..., dict[str, metrics.WeightedAverage | metrics.ClassAccuracy]],
    alive: Callable[[], None] = lambda: None,
    raw_memory: Any = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, and the mean over the classes, of the averaged and of the raw weights.

    Args:
      state: of the training.
      evaluations: name -> batches as of `data.batches.EvalBatches`.
      eval_step: `step.eval_step`, compiled.
      alive: called after each batch.
      raw_memory: what the method remembers for the raw weights, where it is not `state.method` (`look.fit`).

    Returns:
      E.g. `test/accuracy` (averaged weights), `test/accuracy_raw`, `test/balanced_accuracy`, `test/top5_accuracy`,
      `trusted/accuracy`. Each example counts exactly once. Without an average of the weights both are the raw ones.
    """
    averaged = state.params if state.ema_params is None else state.ema_params
    raw_memory = state.method if raw_memory is None else raw_memory
    weights = {"": (averaged, state.method), "_raw": (state.params, raw_memory)}
    row = {}
    for name, batches in evaluations.items():
        sums = dict.fromkeys(weights)
        for batch in batches:
            for suffix, (params, memory) in weights.items():
                hits = eval_step(params, state.batch_stats, memory, batch)
                sums[suffix] = hits if sums[suffix] is None else {k: sums[suffix][k] + hits[k] for k in hits}
            alive()
        for suffix, hits in jax.device_get(sums).items():
            row |= {f"{name}/{metric}{suffix}": value.compute() for metric, value in hits.items()}
    return row


def accuracies(rows: list[dict[str, Any]], name: str, reported: int) -> dict[str, Any]:
    """The accuracies of result.json.

    Args:
      rows: of metrics.jsonl.
      name: what they are measured on.
      reported: the step that counts, `durations.Durations.reported`.
    """
    evaluated = [row for row in rows if f"{name}/accuracy" in row]
    trusted = [row for row in rows if "trusted/accuracy" in row]
    auroc = [row["weight/auroc"] for row in rows if "weight/auroc" in row]
    last = evaluated[-1] if evaluated else {}
    counts = next((row for row in evaluated if row["step"] == reported), last)
    best = max((row[f"{name}/accuracy"] for row in evaluated), default=None)
    chosen = max(evaluated, key=lambda row: rank(row, "trusted/accuracy"), default={})
    is_last = counts.get("step") == rows[-1]["step"]
    return {
        "reported": {
            "step": counts.get("step"),
            "rule": "the last step" if is_last else "the end of the last whole cycle of the learning rate",
            "learning_rate": counts.get(RATE),
        },
        f"{name}_accuracy": counts.get(f"{name}/accuracy"),
        f"{name}_accuracy_raw": counts.get(f"{name}/accuracy_raw"),
        f"{name}_balanced_accuracy": counts.get(f"{name}/balanced_accuracy"),
        f"{name}_top5_accuracy": counts.get(f"{name}/top5_accuracy"),
        f"{name}_accuracy_last": last.get(f"{name}/accuracy"),
        f"{name}_accuracy_best": best,
        "best_chosen_on": name,
        f"{name}_accuracy_best_on_trusted": chosen.get(f"{name}/accuracy"),
        "trusted_accuracy": trusted[-1]["trusted/accuracy"],
        "weight_auroc": auroc[-1] if auroc else None,
    }


def label_auroc(seen: Look, train: Split) -> float | None:
    """Area under the ROC curve of P(given label) as a detector of right labels in the training set.

    It is that of the networks' mean prediction, by the averaged weights where there are any; a network that has learnt
    the wrong labels by heart is at 1/2, whatever its method.

    Args:
      seen: at the end of a run.
      train: what it sees, with true labels.

    Returns:
      None where true labels are not known, or not both kinds are there.
    """
    known = train.clean_labels != UNKNOWN
    if not known.any():
        return None
    given = seen.averaged().probabilities().mean(0)[np.arange(len(train)), train.labels]
    return metrics.detection_auroc(given, np.where(known, train.clean_labels == train.labels, -1))


def headline(row: dict[str, Any], name: str) -> dict[str, float]:
    """What of a row of metrics is shown while it trains; `name` is what accuracy is measured on."""
    keys = {
        "loss/total": "loss",
        "train/accuracy": "train",
        "weight/auroc": "ω-AUROC",
        f"{name}/accuracy": name,
        "speed/images_per_second": "images/s",
    }
    return {short: row[key] for key, short in keys.items() if key in row}
