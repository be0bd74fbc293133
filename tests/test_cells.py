import itertools
import json
import statistics

import pytest
from etils import epath
from runs import ROOT

from ieg_jax import cells
from ieg_jax.errors import UserError
from ieg_jax.experiments import Experiment

EXPERIMENT = Experiment("one", "configs/digits.py:method=ieg,noise_rate=0.4", {"method.relabel": False})


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def store(tmp_path):
    return cells.Store(epath.Path(tmp_path / "work"), epath.Path(tmp_path / "kept"))


def write_run(store, experiment=EXPERIMENT, seed=0, accuracy=0.9, finished=True):
    """A work folder as training leaves it."""
    folder = store.work_folder(experiment, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = cells.load_config(experiment, seed).to_dict()
    config["trusted"]["batch_size"] = config["batch_size"]  # as a run writes it down
    config["eval_batch_size"] = 17  # how it is computed, not what
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {"step": s, "test/accuracy": accuracy * s / 400, "trust/clean": 0.75, "loss/total": 1.0} for s in range(400)
    ]
    rows.append({"step": 400, "test/accuracy": accuracy, "trust/clean": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "test_accuracy": accuracy, "test_accuracy_best": accuracy + 0.02, "test_accuracy_best_on_trusted": 0.5,
        "best_chosen_on": "test", "wall_seconds": 12.0, "device_kind": "cpu", "versions": {"jax": "1.2.3"},
    }  # fmt: skip
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_from_start_to_kept(store):
    assert store.find(EXPERIMENT, 0) is None and store.state(EXPERIMENT, 0) == "not run"
    folder = write_run(store, finished=False)
    assert store.find(EXPERIMENT, 0) is None and store.state(EXPERIMENT, 0) == "step 400"
    write_run(store)
    cell = store.keep(EXPERIMENT, 0)
    assert store.state(EXPERIMENT, 0) == "done" and store.state(EXPERIMENT, 1) == "not run"
    for path in folder.iterdir():
        path.unlink()
    assert store.find(EXPERIMENT, 0) == cell, "kept beyond the work folder"
    file = store.kept_file(EXPERIMENT, 0)
    assert len(file.read_text()) < 5000 and not file.with_name("0.json.tmp").exists()
    assert cell["seed"] == 0 and cell["result"]["test_accuracy"] == 0.9 and len(cell["date"]) == 10


def test_what_is_kept_is_not_replaced(store):
    write_run(store)
    store.keep(EXPERIMENT, 0)
    before = store.kept_file(EXPERIMENT, 0).read_text()
    write_run(store, accuracy=0.1)
    store.keep(EXPERIMENT, 0)
    assert store.kept_file(EXPERIMENT, 0).read_text() == before


def test_settings_are_what_differs_from_the_default(store):
    write_run(store, seed=3)
    settings = store.find(EXPERIMENT, 3)["settings"]
    assert settings["method.relabel"] is False and settings["noise.rate"] == 0.4 and settings["noise.seed"] == 3
    for key in ("eval_batch_size", "trusted.batch_size", "data.dir", "batch_size", "checkpoint_every_steps"):
        assert key not in settings, key


def test_a_run_with_other_settings_is_not_taken_for_this_one(store):
    write_run(store)
    store.keep(EXPERIMENT, 0)
    other = Experiment("one", EXPERIMENT.config, {"method.temperature": 0.25})
    for where in ("work/one/0", "kept/one/0.json"):
        message = f"{where} has a run of one with other settings .*\n  method.relabel: False -> '.no such key.'\n"
        with pytest.raises(UserError, match=message):
            store.find(other, 0)
        assert store.state(other, 0) == "other settings"
        (store.work_folder(EXPERIMENT, 0) / "result.json").unlink(missing_ok=True)


def test_another_place_of_the_data_is_no_other_setting(store):
    write_run(store)
    moved = Experiment("one", EXPERIMENT.config, {"method.relabel": False, "data.dir": "/elsewhere"})
    assert store.state(moved, 0) == "done"


def test_places_of_foreign_images_are_no_other_setting(store):
    keys = {"noise.kind": "open_set", "noise.open_set": "cifar100,imagenet"}
    write_run(store, Experiment("foreign", EXPERIMENT.config, keys))
    moved = keys | {"noise.open_set": "cifar100:/data/c,imagenet:/data/i"}
    assert store.state(Experiment("foreign", EXPERIMENT.config, moved), 0) == "done"
    others = keys | {"noise.open_set": "cifar100"}
    assert store.state(Experiment("foreign", EXPERIMENT.config, others), 0) == "other settings"


def test_curves_are_thinned_and_keep_their_end(store):
    write_run(store)
    curves = store.find(EXPERIMENT, 0)["curves"]
    assert set(curves) == {"test/accuracy", "trust/clean"}
    steps = [step for step, _ in curves["test/accuracy"]]
    assert steps[-1] == 400 and 30 < len(steps) <= cells.MAX_POINTS and steps == sorted(steps)
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1, "evenly"
    assert dict(map(tuple, curves["test/accuracy"]))[400] == 0.9
    assert curves["trust/clean"][-1][0] < 400, "what was not measured is no point"


def test_spread(store):
    for seed, accuracy in enumerate((0.8, 0.9, 0.7)):
        write_run(store, seed=seed, accuracy=accuracy)
    found = [store.find(EXPERIMENT, seed) for seed in range(3)]
    last = cells.spread(found)
    assert last.mean == pytest.approx(80) and last.std == pytest.approx(10) and str(last) == "80.0 ± 10.0"
    assert last.std == pytest.approx(statistics.stdev([80, 90, 70])), "n − 1"
    assert str(cells.spread(found, "best on test")) == "82.0 ± 10.0"
    assert str(cells.spread(found[:1], "best on trusted")) == "50.0"
    assert cells.spread([]) is None
