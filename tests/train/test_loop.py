"""Runs as a whole: what they write, and every way of stopping and starting again."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import x64
from ml_collections import ConfigDict
from runs import assert_same_run, rows, variables

from ieg_jax import config as config_lib
from ieg_jax import inference, models
from ieg_jax.data.batches import train_batches
from ieg_jax.data.load import load_data
from ieg_jax.errors import Interrupted, NonFiniteError, UserError
from ieg_jax.methods import supervised
from ieg_jax.models import onednn
from ieg_jax.runtime import processes
from ieg_jax.runtime.checkpoints import Checkpoints
from ieg_jax.train import begin, evaluation, metrics
from ieg_jax.train.loop import train_and_evaluate
from ieg_jax.train.program import Program


@pytest.fixture(scope="module")
def module_tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture
def config(tiny_config):
    tiny_config.num_train_steps = 6
    tiny_config.log_every_steps = 4  # so that checkpoints at 3 and 6 fall inside a window
    tiny_config.eval_every_steps = 3
    tiny_config.checkpoint_every_steps = 3
    tiny_config.schedule.first_cycle_steps = 100
    return tiny_config


_undisturbed = {}


@pytest.fixture
def undisturbed(config, module_tmp):
    """A run of 6 steps without interruption, made once."""
    if not _undisturbed:
        _undisturbed["result"] = train_and_evaluate(config, str(module_tmp / "whole"))
        _undisturbed["folder"] = module_tmp / "whole"
    return _undisturbed["folder"], _undisturbed["result"]


def test_result_and_files(config, undisturbed):
    folder, result = undisturbed
    assert json.loads((folder / "result.json").read_text()) == result
    expected = [
        "dataset",
        "noise",
        "noise_rate",
        "noise_rate_effective",
        "trusted_per_class",
        "method",
        "model",
        "num_params",
        "seed",
        "steps",
        "test_accuracy",
        "test_accuracy_raw",
        "test_balanced_accuracy",
        "test_top5_accuracy",
        "test_accuracy_best",
        "best_chosen_on",
        "trusted_accuracy",
        "weight_auroc",
        "label_auroc",
        "wall_seconds",
        "compile_seconds",
        "images_per_second",
        "device_kind",
        "num_devices",
        "versions",
        "commit",
    ]
    assert set(expected) <= set(result)
    assert (result["dataset"], result["noise"], result["method"]) == ("digits", "uniform", "ieg")
    assert 0 <= result["test_accuracy"] <= result["test_accuracy_best"] <= 1
    assert result["test_top5_accuracy"] >= result["test_accuracy"]
    assert abs(result["noise_rate_effective"] - 0.36) < 0.05
    table = rows(folder)
    assert [row["step"] for row in table] == [3, 4, 6]
    assert table[-1]["test/accuracy"] == result["test_accuracy"]
    # Of the trusted set, with as many of each class, they are the same.
    assert table[-1]["trusted/balanced_accuracy"] == pytest.approx(table[-1]["trusted/accuracy"])
    assert table[-1]["test/balanced_accuracy"] == result["test_balanced_accuracy"]
    assert "loss/total" in table[1] and "test/accuracy" not in table[1]
    rates = config.schedule.base_lr * (1 + np.cos(np.pi * np.arange(6) / 100)) / 2
    logged = [row["optimizer/learning_rate"] for row in table[1:]]
    assert logged == pytest.approx([rates[:4].mean(), rates[4:].mean()], rel=1e-6), "each of its own steps"
    noise = json.loads((folder / "noise.json").read_text())
    assert np.sum(noise["confusion"]) == noise["num_examples"] == 1297 - 20
    assert json.loads((folder / "trusted.json").read_text())["per_class"] == [2] * 10
    assert json.loads((folder / "config.json").read_text())["method"]["name"] == "ieg"
    assert list(folder.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["3", "6"]


def test_evaluation_agrees_with_a_count_by_hand(config, undisturbed):
    """Accuracy of the averaged weights from the checkpoint, one image at a time in numpy."""

    folder, result = undisturbed
    data = load_data(config)
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        (state, _) = manager.restore(6, args=ocp.args.Composite(tree=ocp.args.StandardRestore()))["tree"]
    network = models.create(config.model, 10)
    weights = {"params": state["ema_params"], "batch_stats": state["batch_stats"]}
    logits = network.apply(weights, data.evaluation.images / np.float32(127.5) - 1, train=False)
    hits = np.argmax(np.asarray(logits), -1) == data.evaluation.labels
    assert len(hits) == 500, "not a multiple of the evaluation batch"
    assert result["test_accuracy"] == pytest.approx(hits.mean(), abs=1e-9)


def test_nothing_moves_unasked_and_each_step_is_compiled_once(config, tmp_path, caplog):
    """No implicit transfer between host and device in a whole run, its last evaluation batch a partial one."""
    config.eval_batch_size, config.profile.start_step, config.profile.num_steps = 64, 4, 2  # 500 = 7 · 64 + 52
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        with caplog.at_level("WARNING"), jax.log_compiles():
            train_and_evaluate(config, str(tmp_path))
    finally:
        jax.config.update("jax_transfer_guard", before)
    compiled = [record.getMessage().split()[1] for record in caplog.records if "Compiling" in record.getMessage()]
    counts = {name: sum(name in what for what in compiled) for name in ("step_and_record", "eval_step", "empty_window")}
    assert counts == {"step_and_record": 1, "eval_step": 1, "empty_window": 1}
    assert list((tmp_path / "plugins" / "profile").rglob("*.xplane.pb")), "and the profile that was asked for is there"
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    parts = {name: row[f"time/{name}"] for name in ("data", "compute", "metrics", "evaluation", "checkpoint", "other")}
    assert all(value >= 0 for value in parts.values()) and parts["compute"] > 0
    assert "speed/flops_utilization" not in row, "the peak of a processor is not known"


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_other_ways_to_compute(config, tmp_path, monkeypatch):
    """8 devices, 1, then 4 as 2 × 2; with and without parts of a batch; against a run that changed nothing."""
    config.method.name, config.model.dtype, config.batch_groups = "l2r", "float64", 8
    config.checkpoint_every_steps = 100
    stops = {"moved": (({"mesh.data": 8}, 2), ({"microbatches": 4}, 4), ({"mesh.data": 2, "mesh.fsdp": 2}, 6))}
    stops["stayed"] = (({}, 6),)
    with x64():
        for name, starts in stops.items():
            for keys, stop in starts:
                config.update_from_flattened_dict({"mesh.data": 1, "mesh.fsdp": 1, "microbatches": 1, **keys})
                config.eval_batch_size = 200
                monkeypatch.setattr(processes.StopRequest, "requested", lambda self, step, stop=stop: step >= stop)
                with contextlib.suppress(Interrupted):
                    train_and_evaluate(config, str(tmp_path / name))
    moved, stayed = (variables(tmp_path / name, 6) for name in ("moved", "stayed"))
    for path in stayed:
        np.testing.assert_allclose(moved[path], stayed[path], rtol=1e-9, atol=1e-11, err_msg=path)
    assert [row["step"] for row in rows(tmp_path / "moved")] == [row["step"] for row in rows(tmp_path / "stayed")]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("where", ["after the checkpoint", "in the evaluation", "between row and checkpoint"])
def test_resuming_changes_nothing(config, undisturbed, tmp_path, monkeypatch, where):
    saved, evaluated = Checkpoints.save, evaluation.evaluate
    calls = []

    def save(self, step, tree, position):
        if where == "between row and checkpoint" and step == 6:
            raise Killed
        saved(self, step, tree, position)
        if where == "after the checkpoint" and step == 3:
            self.wait()
            raise Killed

    def evaluate(*args):
        calls.append(1)
        if where == "in the evaluation" and len(calls) == 2:
            raise Killed
        return evaluated(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        patch.setattr(evaluation, "evaluate", evaluate)
        with pytest.raises(Killed):
            train_and_evaluate(config, str(tmp_path))
    assert not (tmp_path / "result.json").exists()
    if where == "between row and checkpoint":  # and the kill cut a line short
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "test/acc')
    result = train_and_evaluate(config, str(tmp_path))
    assert_same_run(tmp_path, undisturbed[0], step=6)
    assert result["test_accuracy"] == undisturbed[1]["test_accuracy"]
    assert (result["weight_auroc"], result["label_auroc"]) == (
        undisturbed[1]["weight_auroc"],
        undisturbed[1]["label_auroc"],
    )


@pytest.mark.skipif(bool(onednn.missing()), reason=f"oneDNN: {onednn.missing()}")
def test_resuming_changes_nothing_with_onednn(config, undisturbed, tmp_path, monkeypatch):
    config.model.convolutions = "onednn"
    train_and_evaluate(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(processes.StopRequest, "requested", lambda self, step: step >= 2)
        with pytest.raises(Interrupted):
            train_and_evaluate(config, str(tmp_path / "stopped"))
    train_and_evaluate(config, str(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", step=6)
    assert rows(tmp_path / "whole") != rows(undisturbed[0]), "which was not by oneDNN: its bits are others"


def test_sigterm_saves_and_the_same_command_goes_on(config, undisturbed, tmp_path, monkeypatch):
    summarize = metrics.summarize

    def terminated(window):
        os.kill(os.getpid(), signal.SIGTERM)
        return summarize(window)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "summarize", terminated)  # at step 4: neither a checkpoint nor an evaluation
        with pytest.raises(Interrupted, match="stopped at step 5 of 6"):
            train_and_evaluate(config, str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handler is gone again"
    train_and_evaluate(config, str(tmp_path))
    assert_same_run(tmp_path, undisturbed[0], step=6)


def test_a_signal_is_heard_while_the_step_is_compiled(config, tmp_path, monkeypatch):
    stopped = threading.Event()

    def compile_for_long(program, wait):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return wait(lambda: stopped.wait(60))

    monkeypatch.setattr(Program, "compiled_step", compile_for_long)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="while a program was being compiled"):
        train_and_evaluate(config, str(tmp_path))
    assert time.monotonic() - began < 30
    stopped.set()


def test_what_the_compiler_raises_is_raised(config, tmp_path, monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(Program, "compiled_step", lambda program, wait: wait(fail))
    with pytest.raises(ZeroDivisionError):
        train_and_evaluate(config, str(tmp_path))


def test_a_run_that_ends_inside_a_cycle_reports_where_the_last_one_ended(config, tmp_path):
    """Cycles of 2, 3 and 4.5 steps, and six steps: step 5 counts, and predicts."""
    config.schedule.first_cycle_steps, config.checkpoint.keep = 2, 1
    result = train_and_evaluate(config, str(tmp_path))
    rule = "the end of the last whole cycle of the learning rate"
    rate = config.schedule.base_lr * config.schedule.peak_mult * (1 + np.cos(np.pi * 2 / 3)) / 2
    assert result["reported"] == {"step": 5, "rule": rule, "learning_rate": pytest.approx(rate)}
    by_step = {row["step"]: row for row in rows(tmp_path)}
    assert result["test_accuracy"] == by_step[5]["test/accuracy"]
    assert result["test_accuracy_last"] == by_step[6]["test/accuracy"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()} == {"5", "6"}
    assert inference.load(tmp_path).step == 5


def test_a_finished_run_is_reported_and_not_touched(config, undisturbed, monkeypatch):
    folder, result = undisturbed
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(begin, "load_data", lambda config: pytest.fail("nothing is to be loaded"))
    assert train_and_evaluate(config, str(folder)) == result
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_with_the_keys(config, undisturbed):
    config.schedule.base_lr, config.noise.rate = 0.2, 0.5
    with pytest.raises(UserError, match=r"noise.rate: 0.4 -> 0.5\n  schedule.base_lr: 0.1 -> 0.2"):
        train_and_evaluate(config, str(undisturbed[0]))


def test_a_checkpoint_of_another_model_is_refused(config, undisturbed, tmp_path):
    """Even where config.json does not give it away."""
    import shutil

    shutil.copytree(undisturbed[0] / "checkpoints", tmp_path / "checkpoints")
    config.model.width = 2.0
    (tmp_path / "config.json").write_text(config_lib.resolve(config).to_json())
    with pytest.raises(UserError, match=r"another model or method: .* arrays differ[\s\S]*conv0/kernel"):
        train_and_evaluate(config, str(tmp_path))


def test_a_run_without_its_config_is_refused(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no config.json"):
        train_and_evaluate(config, str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_a_work_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train_and_evaluate(config, str(tmp_path / "file"))


def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    load = load_data
    config.method.name = "supervised"

    def poisoned(config, quiet):
        data = load(config, quiet)
        images = data.train.images / np.float32(255)
        return dataclasses.replace(data, train=dataclasses.replace(data.train, images=images))

    monkeypatch.setattr(begin, "load_data", poisoned)
    batches = train_batches

    def with_nan(*args):
        for step, batch in enumerate(batches(*args), start=args[3] + 1):
            yield {**batch, "image": batch["image"] * (np.nan if step == 5 and args[4] > 1 else 1)}

    monkeypatch.setattr(begin, "train_batches", with_nan)
    with pytest.raises(NonFiniteError, match=r"step 5: loss/cross_entropy, loss/total.*checkpoints/3") as error:
        train_and_evaluate(config, str(tmp_path))
    assert "optimizer/gradient_norm" in str(error.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"], "nothing bad is saved"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"mesh.data": 3}, "batch_size=16 is not a multiple of the 3 devices"),
        ({"mesh.data": 99}, "mesh.data=99, but there are 8 devices"),
        ({"mesh.data": 8, "trusted.batch_size": 20}, "trusted.batch_size=20 is not a multiple of the 8"),
        ({"batch_groups": 3}, "not a multiple of batch_groups=3"),
        ({"trusted.per_class": 500}, "trusted.per_class=500, but class"),
        ({"model.name": "resnet"}, "model.name: got 'resnet'"),
        ({"data.name": "fashion_mnist", "data.dir": "/nowhere"}, "lacks train-images"),
    ],
)
def test_user_errors_come_before_anything_is_compiled(config, tmp_path, monkeypatch, keys, message):
    config.update_from_flattened_dict(keys)
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, str(tmp_path))
    assert not (tmp_path / "config.json").exists(), "the folder is free for the corrected command"


def test_several_devices_and_no_test_set(config, tmp_path):
    """The loop on 8 devices, on data without a test set."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", images=rng.random((90, 8, 8, 3)), labels=rng.integers(0, 3, 90))
    config.data.name, config.data.train = "arrays", str(tmp_path / "own.npz")
    config.mesh.data, config.batch_groups, config.eval_batch_size = 8, 8, 16
    config.num_train_steps, config.log_every_steps = 2, 2
    result = train_and_evaluate(config, str(tmp_path / "run"))
    assert (result["num_devices"], result["test_accuracy"]) == (8, None)
    assert 0 <= result["trusted_accuracy"] <= 1


def test_the_method_sees_the_training_set_at_the_end_of_each_epoch(config, tmp_path, monkeypatch):
    seen = []

    def on_epoch(ctx, state, look):
        seen.append((int(state.step), look.epoch, look.is_last, look.probabilities().shape, look.features().shape))
        return state, {}

    monkeypatch.setattr(supervised, "on_epoch", on_epoch, raising=False)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", images=rng.random((46, 8, 8)), labels=np.arange(46) % 3)
    config.data.name, config.data.train, config.method.name = "arrays", str(tmp_path / "own.npz"), "supervised"
    train_and_evaluate(config, str(tmp_path / "run"))
    shapes = ((1, 40, 3), (1, 40, 8))
    # 40 examples, 16 a step: 40 and 80 are passed in steps 3 and 5, and the run ends with step 6.
    assert seen == [(3, 1, False, *shapes), (5, 2, False, *shapes), (6, 2, True, *shapes)]


def test_the_command(tmp_path, tiny_config):
    """In a process of its own: a real SIGTERM, resuming, the finished run, and a bad flag."""
    command = [
        sys.executable, "-m", "ieg_jax.main", "--config=configs/quickstart.py:method=supervised",
        "--config.model.name=tiny", "--config.num_train_steps=200000", "--config.log_every_steps=20",
        "--config.mesh.data=1", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped at step" in error.splitlines()[-1] and "goes on from there" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert "step 20/200000" in output and "ETA" in output

    config_file = tmp_path / "run" / "config.json"
    saved = json.loads(config_file.read_text())
    [step] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    saved["num_train_steps"] = step + 5  # the test's shortcut to the end
    config_file.write_text(json.dumps(saved))
    command[5] = f"--config.num_train_steps={step + 5}"
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert f"goes on from the checkpoint at step {step}" in again.stdout
    result = json.loads(again.stdout.splitlines()[-1])
    assert result["steps"] == step + 5
    finished = train_and_evaluate(ConfigDict(json.loads(config_file.read_text())), str(tmp_path / "run"))
    assert json.loads(json.dumps(finished)) == result

    bad = subprocess.run([*command, "--config.modle.name=x"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 1
    assert "unknown key in --config.modle.name=x" in bad.stderr.splitlines()[-1]
    assert "model" in bad.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "noise, report, words",
    [
        ({"kind": "none"}, {}, ""),
        ({"kind": "uniform", "rate": 0.4}, {"rate": 0.4, "rate_effective": 0.36}, ", 40% uniform noise"),
        ({"kind": "human", "label_set": "worse"}, {"rate": None, "rate_effective": 0.402}, ", 40% human noise (worse)"),
        ({"kind": "file", "label_set": ""}, {"rate": None, "rate_effective": None}, ", file noise"),
    ],
)
def test_the_noise_in_words(tiny_config, noise, report, words):
    config = tiny_config
    config.noise.rate = 0.0
    config.noise.update(noise)
    assert begin.noise_in_words(config, report) == words


WITHOUT, WITH = "oneDNN is not installed", ""
SLOWER = ["up to three times as long as with oneDNN: oneDNN is not installed"]
NEEDS_ONE = "on 4 devices of a processor; oneDNN, which is faster, needs one"


@pytest.mark.parametrize("kind, devices, keys, missing, said", [
    ("cpu", 1, {}, WITH, []),
    ("cpu", 1, {}, WITHOUT, SLOWER),
    ("cpu", 1, {"model.convolutions": "lax"}, WITHOUT, []),
    ("cpu", 1, {"model.dtype": "float64"}, WITHOUT, []),
    ("cpu", 4, {"batch_groups": 8}, WITH, [NEEDS_ONE]),
    ("cpu", 4, {"batch_groups": 2}, WITH, ["batch_groups=2 on 4 devices: ... batch_groups=4 keeps", NEEDS_ONE]),
    ("cpu", 4, {"batch_groups": 4, "microbatches": 2}, WITHOUT, ["batch_groups=8 keeps", *SLOWER]),
    ("TPU v5 lite", 1, {}, WITHOUT, ["model.dtype=float32 on TPU v5 lite: bfloat16 is faster"]),
    ("TPU v5 lite", 1, {"model.dtype": "bfloat16"}, WITH, []),
])  # fmt: skip
def test_what_would_be_faster_on_these_devices(config, kind, devices, keys, missing, said, monkeypatch):
    monkeypatch.setattr(onednn, "missing", lambda: missing)
    monkeypatch.setattr(onednn, "PACKAGED", True)
    config.update_from_flattened_dict(keys)
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)], object))
    shardings = types.SimpleNamespace(num_devices=devices, mesh=mesh)
    data = types.SimpleNamespace(notices=("a note on the data",))
    weights = {"conv1": np.zeros((3, 3, 1, 8)), "conv2": np.zeros((3, 3, 8, 8)), "head": np.zeros((8, 10))}
    program = types.SimpleNamespace(state=types.SimpleNamespace(params=weights))
    run = types.SimpleNamespace(config=config, shardings=shardings, data=data, image_shape=(8, 8, 1), program=program)
    found = begin.notices(run)
    assert found[0] == "a note on the data" and len(found) == 1 + len(said)
    for note, parts in zip(found[1:], said, strict=True):
        assert all(part in note for part in parts.split(" ... "))
    run.image_shape, program.state.params = (1, 1, 5), {"head": weights["head"]}
    told = "".join(begin.notices(run))
    assert "float32" not in told and "oneDNN" not in told, "a network of features is fast in any case"
