"""Writes work folders as a training leaves them, without the training."""

import json

from ieg_jax.reproduce import results
from ieg_jax.reproduce.experiments import Experiment

EXPERIMENT = Experiment("one", "configs/digits.py:method=ieg,noise_rate=0.4", {"method.relabel": False})


def write_run(store, experiment=EXPERIMENT, seed=0, accuracy=0.9, finished=True, given=(0, 1, 2)):
    """Writes the work folder of a run, and returns it."""
    folder = store.work_folder(experiment, seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = results.load_config(experiment, seed).to_dict()
    config["trusted"]["batch_size"] = config["batch_size"]  # a run writes the number for which 0 stands
    config["eval_batch_size"] = 17  # this says how the run is computed, so it is no setting
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
    (folder / "noisy_labels.json").write_text(json.dumps(given))
    (folder / "trusted.json").write_text(json.dumps({"source": "train", "ids": [2]}))
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder
