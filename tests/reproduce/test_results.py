import itertools
import json
import statistics

import numpy as np
import pytest
from etils import epath
from finished_runs import EXPERIMENT, write_run
from runs import ROOT

from ieg_jax.errors import UserError
from ieg_jax.reproduce import catalogue, results
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
    finished = store.keep(EXPERIMENT, 0)
    assert store.state(EXPERIMENT, 0) == "done" and store.state(EXPERIMENT, 1) == "not run"
    for path in folder.iterdir():
        path.unlink()
    assert store.find(EXPERIMENT, 0) == finished, "kept beyond the work folder"
    file = store.kept_file(EXPERIMENT, 0)
    assert len(file.read_text()) < 5000 and not file.with_name("0.json.tmp").exists()
    assert finished["seed"] == 0 and finished["result"]["test_accuracy"] == 0.9 and len(finished["date"]) == 10


def test_what_is_kept_is_not_replaced(store):
    write_run(store)
    store.keep(EXPERIMENT, 0)
    before = store.kept_file(EXPERIMENT, 0).read_text()
    write_run(store, accuracy=0.1)
    store.keep(EXPERIMENT, 0)
    assert store.kept_file(EXPERIMENT, 0).read_text() == before


def test_what_a_run_has_learnt_from_is_kept_once(store):
    """Two methods with the same labels share a file, which a training reads; another label, another name."""
    other = Experiment("other", "configs/digits.py:method=supervised,noise_rate=0.4")
    for experiment, seed, given in ((EXPERIMENT, 0, (9, 1, 2)), (other, 0, (9, 1, 2)), (EXPERIMENT, 1, (9, 1, 0))):
        write_run(store, experiment, seed, given=given)
    names = [store.keep(*run)["labels"] for run in ((EXPERIMENT, 0), (other, 0), (EXPERIMENT, 1))]
    assert names[0] == names[1] != names[2]
    kept = store.results / "labels"
    assert sorted(path.name for path in kept.iterdir()) == sorted(set(names))
    labels = np.load(kept / names[0] / "noisy_labels.npy")
    assert labels.tolist() == [9, 1, 2] and labels.dtype == np.uint8
    assert json.loads((kept / names[0] / "trusted.json").read_text())["ids"] == [2]
    config = results.load_config(EXPERIMENT, 0).to_dict()
    config["noise"]["kind"] = "human"
    folder = write_run(store, other, 1, given=(5, 5, 5))
    (folder / "config.json").write_text(json.dumps(config))
    published = kept / store.keep(other, 1)["labels"]
    assert [path.name for path in published.iterdir()] == ["trusted.json"], "labels of people are their publishers'"


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


def test_keys_that_nothing_reads_are_no_other_setting(store):
    """Earlier versions set keys whatever the method was; here in a kept file, and in a work folder."""
    l2r = Experiment("l2r", "configs/digits.py:method=l2r,noise_rate=0.4")
    for seed in (0, 1):
        write_run(store, l2r, seed)
        store.keep(l2r, seed)
    unread = {"method.consistency_weight": 5.0, "method.q": 0.5, "model.conventions": "torch"}
    kept = json.loads(store.kept_file(l2r, 0).read_text())
    assert not unread.keys() & kept["settings"].keys()
    kept["settings"] |= unread
    store.kept_file(l2r, 0).write_text(json.dumps(kept))
    (store.work_folder(l2r, 0) / "result.json").unlink()
    assert store.find(l2r, 0) == kept
    config_file = store.work_folder(l2r, 1) / "config.json"
    config = json.loads(config_file.read_text())
    for key, value in unread.items():
        group, name = key.split(".")
        config[group][name] = value
    config_file.write_text(json.dumps(config))
    assert store.state(l2r, 1) == "done"

    kept["settings"]["meta.learning_rate"] = 0.5
    store.kept_file(l2r, 0).write_text(json.dumps(kept))
    assert store.state(l2r, 0) == "other settings", "l2r reads this one"


def test_the_runs_of_the_docs_are_those_of_the_experiments(tmp_path):
    store = results.Store(epath.Path(tmp_path), epath.Path(ROOT / "results"))
    for name, seeds in (("quick", 1), ("fashion", 3)):
        for experiment in catalogue.tables()[name].experiments.values():
            assert [store.state(experiment, seed) for seed in range(seeds)] == ["done"] * seeds, experiment.name


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


def test_the_mean_is_no_median():
    """Mean and sample standard deviation of 1, 2 and 6: 3, and √((4 + 1 + 9) / 2)."""
    found = results.Spread((1.0, 2.0, 6.0))
    assert found.mean == pytest.approx(3) and found.std == pytest.approx(7**0.5)
