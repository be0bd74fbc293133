import itertools
import statistics

import pytest
from etils import epath
from finished_runs import EXPERIMENT, write_run
from runs import ROOT

from ieg_jax.errors import UserError
from ieg_jax.reproduce import results
from ieg_jax.reproduce.experiments import Experiment


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def store(tmp_path):
    return results.Store(epath.Path(tmp_path / "work"), epath.Path(tmp_path / "kept"))


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
    assert steps[-1] == 400 and 30 < len(steps) <= results.MAX_POINTS and steps == sorted(steps)
    assert len({b - a for a, b in itertools.pairwise(steps)}) == 1, "evenly"
    assert dict(map(tuple, curves["test/accuracy"]))[400] == 0.9
    assert curves["trust/clean"][-1][0] < 400, "what was not measured is no point"


def test_spread(store):
    for seed, accuracy in enumerate((0.8, 0.9, 0.7)):
        write_run(store, seed=seed, accuracy=accuracy)
    found = [store.find(EXPERIMENT, seed) for seed in range(3)]
    last = results.spread(found)
    assert last.mean == pytest.approx(80) and last.std == pytest.approx(10) and str(last) == "80.0 ± 10.0"
    assert last.std == pytest.approx(statistics.stdev([80, 90, 70])), "n − 1"
    assert str(results.spread(found, "best on test")) == "82.0 ± 10.0"
    assert str(results.spread(found[:1], "best on trusted")) == "50.0"
    assert results.spread([]) is None
