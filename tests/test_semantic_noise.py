import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from configs import default
from ieg_jax import inference
from ieg_jax.data.load import load_data
from ieg_jax.data.noise import kinds
from ieg_jax.data.noise.files import write_labels
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError
from ieg_jax.reproduce import semantic_labels
from ieg_jax.train.loop import train_and_evaluate


def test_the_training_on_the_clean_share():
    config = default.get_config()
    config.noise.kind, config.noise.rate, config.noise.selection = "uniform", 0.4, "exact"
    config.augment.num_views, config.model.width, config.batch_size = 1, 10.0, 10
    config.trusted.ids, config.augment.standard = "trusted.json", "crop(pad=2)"
    before = config.to_json()
    got = semantic_labels.training_config(config, 0.05, "vgg13")
    assert config.to_json() == before
    assert (got.method.name, got.model.name, got.model.width) == ("trusted_only", "vgg13", 1.0)
    kinds.validate(got.noise)
    assert got.noise.kind == "none"
    assert (got.trusted.source, got.trusted.fraction, got.trusted.ids) == ("train", 0.05, "")
    assert (got.augment.standard, got.augment.strong, got.augment.num_views) == ("crop(pad=2)", "", 2)
    # Of 1000 examples 50 are trained on and 950 make an epoch: 200 passes over 50 in batches of 10 are 1000 steps.
    assert got.num_train_steps == 0 and got.num_train_epochs * 950 / 10 == pytest.approx(1000)
    assert semantic_labels.training_config(config, 0.05, "wide_resnet").model.width == 10.0, "it is its own network"


def test_what_the_user_sets_is_kept():
    config = default.get_config()
    config.num_train_epochs, config.schedule.base_lr, config.model.width = 7.0, 0.3, 0.5
    overridden = ["num_train_epochs", "schedule.base_lr", "model.width"]
    got = semantic_labels.training_config(config, 0.2, "vgg13", overridden)
    assert (got.num_train_epochs, got.schedule.base_lr, got.model.width) == (7.0, 0.3, 0.5)
    assert (got.schedule.name, got.ema.decay) == ("cosine", 0.0)
    with pytest.raises(UserError, match=r"--config\.noise\.kind cannot be set here"):
        semantic_labels.training_config(config, 0.2, "vgg13", ["seed", "noise.kind"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_is_none(fraction):
    with pytest.raises(UserError, match="--fraction: got"):
        semantic_labels.training_config(default.get_config(), fraction, "vgg13")


def test_files_that_cannot_be_written(tmp_path):
    assert semantic_labels.check_out(str(tmp_path / "labels.npy")) == tmp_path / "labels.npy"
    (tmp_path / "old.json").write_text("[]")
    for name, message in (("labels.txt", "npy or .json"), ("old.json", "exists"), ("no/labels.npy", "no folder")):
        with pytest.raises(UserError, match=message):
            semantic_labels.check_out(str(tmp_path / name))


def test_summary_by_hand():
    labels = semantic_labels.Labels(
        predicted=np.array([0, 1, 0, 0, 0, 0, 2, 3]),
        true=np.array([0, 0, 0, 0, 1, 1, 2, -1]),
        trained_on=np.array([True, False, False, False, False, False, True, False]),
        class_names=("cat", "dog", "horse", "cow"),
    )
    lines = semantic_labels.summary(labels).splitlines()
    # Three of seven with a known label; three of the five of these off the clean share.
    assert lines[0] == ("3 of 7 labels are wrong, 42.9 %; of the 5 examples that the network was not trained on 60.0 %")
    assert lines[1:] == ["  cat     25.0 %", "  dog    100.0 %", "  horse    0.0 %", "  cow        – %"]


@pytest.mark.slow
def test_labels_of_digits_and_back_as_noise(tiny_config, tmp_path, monkeypatch):
    digits = sources.REGISTRY["digits"].read(tiny_config.data)
    order = np.random.default_rng(0).permutation(1297)
    shuffled = dataclasses.replace(digits, train=digits.train.take(order))
    monkeypatch.setitem(sources.REGISTRY, "digits", sources.Reader(lambda data: shuffled))
    tiny_config.num_train_steps = tiny_config.eval_every_steps = tiny_config.log_every_steps = 40
    overridden = ["num_train_steps", "num_train_epochs"]
    config = semantic_labels.training_config(tiny_config, 0.05, "tiny", overridden)
    labels = semantic_labels.make_labels(config, str(tmp_path / "run"))
    ids = digits.train.ids
    assert (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(labels.true, digits.train.clean_labels, "in ascending order of ids")
    assert labels.predicted.shape == (1297,) and labels.predicted.dtype == np.int32
    per_class = np.bincount(labels.true)
    np.testing.assert_array_equal(np.bincount(labels.true[labels.trained_on]), np.round(0.05 * per_class))
    clean_share = json.loads((tmp_path / "run" / "trusted.json").read_text())["ids"]
    assert set(ids[labels.trained_on]) == set(clean_share)

    # The same network on the test set, which the training has measured in its own way.
    result = train_and_evaluate(config, str(tmp_path / "run"))  # is finished: nothing is trained again
    trained = inference.load(tmp_path / "run")
    predicted = inference.predict(trained, digits.test).argmax(-1)
    assert np.mean(predicted == digits.test.labels) == result["test_accuracy"]
    np.testing.assert_array_equal(inference.predict(trained, digits.train).argmax(-1), labels.predicted)
    wrong = labels.predicted != labels.true
    assert abs(np.mean(~wrong) - result["test_accuracy"]) < 0.1, "training set and test set are of a kind"

    write_labels(tmp_path / "labels.npy", labels.predicted)
    tiny_config.noise.kind, tiny_config.noise.rate = "file", 0.0
    tiny_config.noise.file = str(tmp_path / "labels.npy")
    for source, expected in ((digits, labels.predicted), (shuffled, labels.predicted[order])):
        np.testing.assert_array_equal(kinds.corrupt(source, tiny_config.noise).labels, expected)
    # With the clean share as the trusted set the labels of all the others are left.
    tiny_config.trusted.ids = str(tmp_path / "run" / "trusted.json")
    data = load_data(tiny_config)
    assert sorted(data.trusted.ids) == sorted(clean_share)
    assert data.noise_report["rate_effective"] == pytest.approx(wrong[~labels.trained_on].mean())


def run(*arguments):
    command = [sys.executable, "-m", "ieg_jax.data.semantic_noise", "--config=configs/default.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_mistakes_are_one_line(tmp_path):
    done = run(f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'labels.csv'}")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: --out=")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path):
    out = tmp_path / "labels.json"
    arguments = [
        f"--workdir={tmp_path / 'run'}", f"--out={out}", "--model=tiny", "--fraction=0.1",
        "--config.num_train_epochs=0", "--config.num_train_steps=10",
    ]  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    labels = json.loads(out.read_text())
    assert len(labels) == 1297 and set(labels) <= set(range(10))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_train_steps"], config["model"]["name"], config["trusted"]["fraction"]) == (10, "tiny", 0.1)
    wrong = np.mean(np.array(labels) != sources.load(default.get_config().data).train.clean_labels)
    assert f" {100 * wrong:.1f} %" in done.stdout
    again = run(*arguments)
    assert again.returncode == 1 and "exists and is not overwritten" in again.stderr
    out.unlink()
    assert run(*arguments).returncode == 0
    assert json.loads(out.read_text()) == labels, "the finished training is used again"
