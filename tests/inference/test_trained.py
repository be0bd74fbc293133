import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import ROOT

from ieg_jax import inference, models
from ieg_jax.data.load import load_data
from ieg_jax.errors import UserError
from ieg_jax.train.loop import train_and_evaluate


@pytest.fixture(scope="module")
def module_tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("inference")


_runs = {}


@pytest.fixture
def run(tiny_config, module_tmp):
    """A run of 4 steps on one device with checkpoints at 2 and 4, made once: (config, folder, result)."""
    if not _runs:
        folder = module_tmp / "run"
        tiny_config.method.name = "l2r"
        _runs["run"] = tiny_config, folder, train_and_evaluate(tiny_config, str(folder))
    return _runs["run"]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def saved(folder, step):
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        return manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore()))["tree"][0]


def by_hand(config, state, weights, images):
    variables = {"params": state[weights], "batch_stats": state["batch_stats"]}
    network = models.create(config.model, 10)
    return softmax(np.asarray(network.apply(variables, images / np.float32(127.5) - 1, train=False), np.float64))


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_accuracy_is_that_of_the_result(run):
    config, folder, result = run
    evaluation = load_data(config).evaluation
    before = files(folder)
    trained = inference.load(folder)
    probabilities = inference.predict(trained, evaluation)
    assert files(folder) == before, "nothing is written"
    assert (trained.step, trained.num_classes) == (4, 10)
    assert (probabilities.shape, probabilities.dtype) == ((500, 10), np.float32)
    assert len(jax.devices()) == 8 and 500 % 8, "the batch is padded to the devices, the last one to the batch"
    assert np.mean(probabilities.argmax(-1) == evaluation.labels) == result["test_accuracy"]


def test_the_probabilities_are_those_of_the_averaged_weights_in_order(run):
    config, folder, _ = run
    evaluation = load_data(config).evaluation
    state = saved(folder, 4)
    expected = by_hand(config, state, "ema_params", evaluation.images)
    assert np.abs(expected - by_hand(config, state, "params", evaluation.images)).max() > 1e-4
    rows = np.random.default_rng(0).permutation(500)[:33]
    for chosen in (np.arange(500), rows):
        got = inference.predict(inference.load(folder), evaluation.take(chosen))
        np.testing.assert_allclose(got, expected[chosen], atol=1e-5)


def test_an_interrupted_run_is_read_at_its_newest_checkpoint(run, tmp_path):
    config, folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "result.json").unlink()
    trained = inference.load(str(tmp_path / "run"))
    assert trained.step == 2
    evaluation = load_data(config).evaluation.take(np.arange(20))
    expected = by_hand(config, saved(folder, 2), "ema_params", evaluation.images)
    np.testing.assert_allclose(inference.predict(trained, evaluation), expected, atol=1e-5)


def test_the_raw_weights_where_there_is_no_average_and_another_optimizer(tiny_config, tmp_path):
    tiny_config.ema.decay = 0.0
    tiny_config.optimizer.name, tiny_config.method.name = "adam", "supervised"
    tiny_config.method.name = "supervised"
    tiny_config.batch_size = 12  # no multiple of the eight devices that predict
    train_and_evaluate(tiny_config, str(tmp_path))
    evaluation = load_data(tiny_config).evaluation.take(np.arange(20))
    expected = by_hand(tiny_config, saved(tmp_path, 4), "params", evaluation.images)
    np.testing.assert_allclose(inference.predict(inference.load(tmp_path), evaluation), expected, atol=1e-5)


def test_labels_are_not_looked_at(run):
    config, folder, _ = run
    evaluation = load_data(config).evaluation.take(np.arange(20))
    trained = inference.load(folder)
    other = dataclasses.replace(evaluation, labels=(evaluation.labels + 1) % 10)
    np.testing.assert_array_equal(inference.predict(trained, evaluation), inference.predict(trained, other))


def test_folders_without_a_run(run, tmp_path):
    _, folder, _ = run
    with pytest.raises(UserError, match=r"no config\.json"):
        inference.load(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=r'has no network\.json.*{"class": null, "image_shape": '):
        inference.load(tmp_path)
    shutil.copy(folder / "network.json", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        inference.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        inference.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["data"] == 1
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_what_is_exported_predicts_the_same(run, tmp_path):
    config, folder, _ = run
    out = tmp_path / "model"
    command = [sys.executable, "-m", "ieg_jax.export", f"--workdir={folder}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("tiny of step 4, 10 classes, ")
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "weights.npz"]
    evaluation = load_data(config).evaluation
    exported, trained = inference.load(out), inference.load(folder)
    assert exported.class_names == tuple("0123456789")
    np.testing.assert_array_equal(
        inference.predict(exported, evaluation), inference.predict(trained, evaluation), strict=True
    )
    with np.load(out / "weights.npz") as arrays:  # without this package
        np.testing.assert_array_equal(arrays["params/head/kernel"], trained.params["head"]["kernel"])
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].endswith("is not empty; name a new folder")


def test_weights_that_are_not_what_was_saved(run, tmp_path):
    """The files can be read, but a checksum is another."""
    shutil.copytree(run[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints" / "4" / "data" / "metadata"
    content = json.loads(file.read_text())
    content["checksums"]["0/ema_params/head/kernel"] ^= 1
    file.write_text(json.dumps(content))
    assert inference.load(tmp_path).step == 2
    with pytest.raises(UserError, match="checkpoint 4 can be read"):
        inference.load(tmp_path, step=4)


def test_which_checkpoint(run, tmp_path):
    _, folder, _ = run
    assert inference.load(folder, step=2).step == 2
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        inference.load(folder, step=3)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "4").rglob("*"):
        if (path.is_file() and "ocdbt" in str(path)) or path.parent.name == "d":
            path.write_bytes(b"damaged")
    assert inference.load(tmp_path).step == 2, "the newest that is not damaged"
    with pytest.raises(UserError, match="checkpoint 4 can be read"):
        inference.load(tmp_path, step=4)
