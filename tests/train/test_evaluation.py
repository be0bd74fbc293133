"""Evaluation and what result.json says of it, on numbers made up."""

import types

import numpy as np
import pytest

from configs import default
from ieg_jax.data.splits import UNKNOWN, make_split
from ieg_jax.errors import UserError
from ieg_jax.runtime.workdir import RATE
from ieg_jax.train import begin, evaluation
from ieg_jax.train.metrics import WeightedAverage


def hits(params, batch_stats, memory, batch):
    """A network that has `params` right answers of 10 in a batch."""
    assert (batch_stats, memory) == ("statistics", "memory")
    return {"accuracy": WeightedAverage(params + batch, 10)}


def state(**weights):
    return types.SimpleNamespace(batch_stats="statistics", method="memory", **weights)


def test_averaged_and_raw_weights_over_all_batches():
    found = evaluation.evaluate(state(params=1, ema_params=4), {"test": [0, 3], "trusted": [2]}, hits)
    assert found == {
        "test/accuracy": (4 + 7) / 20,
        "test/accuracy_raw": (1 + 4) / 20,
        "trusted/accuracy": 6 / 10,
        "trusted/accuracy_raw": 3 / 10,
    }


def test_without_an_average_both_are_the_raw_weights():
    found = evaluation.evaluate(state(params=1, ema_params=None), {"test": [0]}, hits)
    assert found == {"test/accuracy": 0.1, "test/accuracy_raw": 0.1}


def test_best_steps_by_hand():
    rows = [
        {"step": 1, "test/accuracy": 0.5, "test/accuracy_raw": 0.4, "trusted/accuracy": 1.0},
        {"step": 2, "test/accuracy": 0.9, "test/accuracy_raw": 0.3, "trusted/accuracy": 0.8},
        {"step": 3, "weight/auroc": 0.6},
        {"step": 4, "test/accuracy": 0.7, "test/accuracy_raw": 0.6, "trusted/accuracy": 1.0},
        {"step": 5, "test/accuracy": 0.6, "test/accuracy_raw": 0.2, "trusted/accuracy": 0.9},
    ]
    found = evaluation.accuracies(rows, "test", reported=5)
    assert (found["test_accuracy"], found["test_accuracy_raw"], found["trusted_accuracy"]) == (0.6, 0.2, 0.9)
    assert found["test_accuracy_best"] == 0.9
    assert found["test_accuracy_best_on_trusted"] == 0.7, "the last of the steps 1 and 4, which are equally good"
    assert found["reported"] == {"step": 5, "rule": "the last step", "learning_rate": None}
    assert found["weight_auroc"] == pytest.approx(0.6)


class Seen:
    """What two networks make of four examples of two classes."""

    def averaged(self):
        return self

    def probabilities(self):
        return np.array(
            [[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8], [0.1, 0.9], [0, 1]]]
        )


@pytest.mark.parametrize(
    ("true", "expected"),
    # P(given) is 0.8, 0.5, 0.8 and 0.2.
    [
        ([0, 1, 1, 1], 1.0),
        ([1, 0, 1, 1], 2.5 / 4),
        ([0, 0, 0, 0], 0.5 / 3),
        ([UNKNOWN] * 4, None),
        ([0, 0, 1, 0], None),
    ],
)
def test_the_given_labels_that_are_believed(true, expected):
    train = make_split(np.zeros((4, 1, 1, 1), np.uint8), [0, 0, 1, 0], true)
    assert evaluation.label_auroc(Seen(), train) == pytest.approx(expected)


def test_the_end_of_a_cycle_counts_and_a_low_rate_breaks_ties():
    rows = [
        {"step": 1, "test/accuracy": 0.5, "trusted/accuracy": 1.0, RATE: 0.3},
        {"step": 2, "test/accuracy": 0.8, "test/accuracy_raw": 0.75, "trusted/accuracy": 1.0, RATE: 0.001},
        {"step": 3, "test/accuracy": 0.6, "trusted/accuracy": 1.0, RATE: 0.2},
    ]
    found = evaluation.accuracies(rows, "test", reported=2)
    rule = "the end of the last whole cycle of the learning rate"
    assert found["reported"] == {"step": 2, "rule": rule, "learning_rate": 0.001}
    assert (found["test_accuracy"], found["test_accuracy_raw"], found["test_accuracy_last"]) == (0.8, 0.75, 0.6)
    assert found["test_accuracy_best_on_trusted"] == 0.8, "of equal steps that with the lowest rate"


def test_checkpoints_can_be_chosen_by_every_metric():
    config, program = default.get_config(), types.SimpleNamespace(window=types.SimpleNamespace(averages={"loss/total"}))
    config.checkpoint.keep_best = 1
    for metric in ("trusted/balanced_accuracy", "test/balanced_accuracy_raw", "loss/total"):
        config.checkpoint.best_metric = metric
        begin._check_best_metric(config, program, ["test", "trusted"])
    config.checkpoint.best_metric = "test/balanced"
    with pytest.raises(UserError, match="best_metric: got 'test/balanced', expected one of .*test/balanced_accuracy"):
        begin._check_best_metric(config, program, ["test", "trusted"])
