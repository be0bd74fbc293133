"""The leaderboard: the search for settings, which is as long for each method, and the page that is made of the runs."""

import json

import pytest
from etils import epath
from finished_runs import write_run
from runs import ROOT

from ieg_jax import methods
from ieg_jax.errors import UserError
from ieg_jax.reproduce import leaderboard, results

SEARCHES = [name for name, data in leaderboard.DATA.items() if data.tuned_by]


@pytest.mark.parametrize("data", SEARCHES)
def test_each_method_is_searched_with_the_same_effort(data):
    assert leaderboard.GRID.keys() == methods.REGISTRY.keys()
    for method in leaderboard.DATA[data].methods:
        noise = leaderboard.DATA[data].tuned_by[0]
        trials = [leaderboard.trial(data, method, number, noise) for number in range(leaderboard.TRIALS)]
        configs = [results.settings(results.load_config(trial, 0)) for trial in trials]
        assert len(leaderboard.settings(data, method)) == leaderboard.TRIALS
        assert len({json.dumps(config) for config in configs}) == leaderboard.TRIALS, (
            f"{method}: a setting occurs twice"
        )
        for config in configs:
            assert config["data.validation_size"] > 0, "the test set is not read"
            assert config["seed"] == leaderboard.FIRST_SEED >= 100


def test_phases_are_shorter_where_a_training_is():
    of_digits, of_cifar10n = (leaderboard.settings(data, "promix")[3] for data in ("digits", "cifar10n"))
    assert of_digits == {"method.pretrain_epochs": 4.0, "method.guess_after_epochs": 8.0}
    assert of_cifar10n == {"method.pretrain_epochs": 1.0, "method.guess_after_epochs": 2.0}
    assert leaderboard.settings("cifar10n", "gce") == leaderboard.settings("digits", "gce")


def store_at(folder):
    return results.Store(epath.Path(folder) / "work", epath.Path(folder) / "kept")


def write_trials(store, method, accuracies):
    """Runs of every setting of a method on digits, with these validation accuracies at both rates of noise."""
    for number, pair in enumerate(accuracies):
        for noise, accuracy in zip(leaderboard.DATA["digits"].tuned_by, pair, strict=True):
            folder = write_run(store, leaderboard.trial("digits", method, number, noise), 0)
            (folder / "result.json").write_text(json.dumps({"validation_accuracy": accuracy}))


def test_the_best_mean_is_chosen_and_of_equal_ones_the_first(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    write_trials(store, "elr", [(0.8, 0.6), (0.9, 0.7), (0.7, 0.9), (0.99, 0.5)])  # means 0.7, 0.8, 0.8, 0.745
    write_trials(store, "gce", [(0.8, 0.6), (0.8, 0.6), (0.6, 0.8), (0.1, 0.1)])
    write_trials(store, "sop", [(0.8, 0.6)])  # not all of them
    written = leaderboard.choose("tune-digits", store)
    found = json.loads(written)
    assert found["trials"].keys() == {"elr", "gce"}
    assert (found["seed"], found["validation"]) == (100, 400)
    assert found["trials"]["elr"][1] == {"settings": {"method.early_learning_weight": 1.0}, "accuracy": [0.9, 0.7]}
    monkeypatch.setattr(leaderboard, "searched", lambda data: found["trials"])
    assert leaderboard.chosen("digits", "elr") == {"method.early_learning_weight": 1.0}
    assert leaderboard.chosen("fashion", "elr") == leaderboard.chosen("digits", "elr"), "settings of digits"
    assert leaderboard.chosen("fashion", "dividemix") == {"method.divide_epochs": 5.0}, "half as many epochs as digits"
    assert leaderboard.chosen("digits", "gce") == {} == leaderboard.chosen("digits", "sop")
    assert leaderboard.entry("digits", "elr", "uniform 0.8").name == "digits-elr-0.8-tuned"
    assert leaderboard.entry("digits", "gce", "uniform 0.8").name == "digits-gce-0.8"


def test_what_cannot_be_chosen(tmp_path):
    with pytest.raises(UserError, match="expected one of tune-digits, tune-cifar10n"):
        leaderboard.choose("tune-fashion", store_at(tmp_path))
    with pytest.raises(UserError, match="no method has finished runs"):
        leaderboard.choose("tune-digits", store_at(tmp_path))


def test_a_line_for_each_method_the_best_first(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    monkeypatch.setattr(leaderboard, "searched", lambda data: {})
    for method, accuracy in (("elr", 0.7), ("l2r", 0.8)):
        for seed in range(2):
            write_run(store, leaderboard.entry("digits", method, "uniform 0.8"), seed, accuracy + 0.02 * seed)
    folder = store.work_folder(leaderboard.entry("digits", "l2r", "uniform 0.8"), 1)
    result = json.loads((folder / "result.json").read_text()) | {"weight_auroc": 0.75, "label_auroc": 0.5}
    (folder / "result.json").write_text(json.dumps(result))
    lines = leaderboard.page(store, 3).splitlines()
    table = [line for line in lines if line.startswith("| `")]
    assert table == [
        "| `l2r` | yes | 81.0 ± 1.4 | – | 83.0 ± 1.4 | 0.500 | 0.750 | 10 | 12 | 2 |",
        "| `elr` | no | 71.0 ± 1.4 | 50.0 ± 0.0 | 73.0 ± 1.4 |  |  | 3 | 12 | 2 |",
    ]
    assert "### uniform 0.8" in lines and "### uniform 0.4" not in lines


def test_plain_training_as_it_comes_is_beside_what_a_search_made_of_it(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    searched = {"supervised": [{"settings": {}, "accuracy": [0.1]}, {"settings": {"seed": 7}, "accuracy": [0.2]}]}
    monkeypatch.setattr(leaderboard, "searched", lambda data: searched if data == "digits" else {})
    write_run(store, leaderboard.entry("digits", "supervised", "uniform 0.8"), 0, 0.7)
    write_run(store, leaderboard.DATA["digits"].make("supervised", rate=0.8), 0, 0.8)
    lines = [line for line in leaderboard.page(store, 1).splitlines() if line.startswith("| `supervised`")]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| `supervised`, as it comes", "| `supervised` *"]


def test_a_damaged_search_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "FOLDER", tmp_path)
    (tmp_path / "digits.json").write_text("")
    with pytest.raises(UserError, match=r"digits\.json.*restore it"):
        leaderboard.searched.__wrapped__("digits")


def test_the_page_is_that_of_the_runs_that_are_kept():
    store = results.Store(epath.Path(ROOT) / "nowhere", epath.Path(ROOT) / "results")
    assert (ROOT / "docs" / "leaderboard.md").read_text() == leaderboard.page(store, 3), (
        "python -m ieg_jax.reproduce leaderboard > docs/leaderboard.md"
    )


def test_settings_that_are_chosen_are_among_those_of_the_grid():
    for data in SEARCHES:
        for method, trials in leaderboard.searched(data).items():
            assert [trial["settings"] for trial in trials] == list(leaderboard.settings(data, method))
