"""Several processes: what they agree on, and that they compute what one computes."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
import runs
from conftest import x64

from configs import quickstart
from ieg_jax import methods
from ieg_jax.errors import Interrupted, UserError
from ieg_jax.runtime import processes
from ieg_jax.train.loop import train_and_evaluate


def wait_for(condition, processes, what, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, what
        time.sleep(0.1)


def test_processes_agree_and_fail_together(tmp_path):
    started = runs.start([runs.ROOT / "tests" / "distributed_checks.py", tmp_path], 2, 2, log=tmp_path)
    assert [process.wait(120) for process in started] == [0, 0]
    for process in range(2):
        lines = (tmp_path / f"{process}.txt").read_text().splitlines()
        found = json.loads(next(line for line in lines if line.startswith("RESULT")).removeprefix("RESULT"))
        assert (found["processes"], found["devices"]) == (2, 4)
        assert found["exchanged"] == ["", "ωλ"]
        assert (found["from_first"], found["empty"]) == ("I am 0", "")
        assert found["together"] == "process 1 of 2: no such file on 1"
        assert found["nobody fails"] == found["same"] == found["shared"] == ""
        assert found["not the same"].startswith("the data of process 1 is not that of process 0 (1 of 2 differ)")
        assert "process 1 does not see what process 0 writes there" in found["not shared"]
    assert list((tmp_path / "shared").iterdir()) == [], "no trace is left"


@pytest.mark.parametrize(
    "count, method",
    [
        (2, "l2r"),
        pytest.param(4, "ieg", marks=pytest.mark.slow),
        *(pytest.param(2, method, marks=pytest.mark.slow) for method in methods.REGISTRY if method != "l2r"),
    ],
)
def test_several_processes_do_what_one_does(tmp_path, monkeypatch, count, method):
    """In float64, where rounding cannot hide a mistake: variables, metrics, noise, trusted set; and SIGTERM to one."""
    keys = runs.SMALL | {"model.dtype": "float64", "num_train_steps": 100_000, "checkpoint_every_steps": 50_000}
    keys |= {"log_every_steps": 2, "eval_every_steps": 3, "eval_batch_size": 200}
    arguments = runs.main_arguments(f"configs/quickstart.py:method={method}", tmp_path / "many", keys)
    started = runs.start(arguments, count, 2, {"JAX_ENABLE_X64": "1"}, log=tmp_path)
    metrics = tmp_path / "many" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, started, "no metrics")
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(300) for process in started] == [75] * count
    finally:
        for process in started:
            process.kill()
    logs = [(tmp_path / f"{process}.txt").read_text() for process in range(count)]
    (step,) = runs.checkpoint_steps(tmp_path / "many")
    assert all(f"stopped at step {step} of 100000" in log for log in logs), logs
    assert ["images/s" in log for log in logs] == [True] + [False] * (count - 1), "process 0 alone reports"

    config = quickstart.get_config(f"method={method}")
    config.update_from_flattened_dict(keys | {"mesh.data": 2 * count})
    monkeypatch.setattr(processes.StopRequest, "requested", lambda self, now: now >= step)
    with x64(), pytest.raises(Interrupted):
        train_and_evaluate(config, str(tmp_path / "one"))
    one, many = runs.variables(tmp_path / "one", step), runs.variables(tmp_path / "many", step)
    assert one.keys() == many.keys()
    for path in one:
        np.testing.assert_allclose(one[path], many[path], rtol=1e-9, atol=1e-9, err_msg=path)
    for name in ("noise.json", "trusted.json", "noisy_labels.json", "data.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "many" / name).read_text()
    for first, second in zip(runs.rows(tmp_path / "one"), runs.rows(tmp_path / "many"), strict=True):
        assert first == pytest.approx(second, rel=1e-8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("localhost", 2, 0), r"--coordinator=localhost: expected host:port"),
        (("", 2, 0), r"--coordinator=: expected host:port"),
        (("a:1", 0, 0), r"--num_processes=0"),
        (("a:1", 2, 2), r"--process_id=2: expected 0 to 1"),
        (("a:1", 2, -1), r"--process_id=-1"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        processes.initialize(*arguments)


def refuse_with(monkeypatch, message):
    """What jax answers; it does not let itself be asked when it has computed something already."""

    def initialize(**arguments):
        raise ValueError(message)

    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)


def test_a_process_by_itself_needs_nothing(monkeypatch):
    refuse_with(monkeypatch, "coordinator_address should be defined.")
    processes.initialize("", 0, -1)  # no cluster here
    processes.initialize("a:1", 1, 0)
    assert processes.exchange("x") == ["x"]
    assert processes.from_first("x") == "x"
    with pytest.raises(UserError, match="^alone$"), processes.together():
        raise UserError("alone")


def test_a_cluster_that_is_described_in_part_is_no_process_by_itself(monkeypatch):
    refuse_with(monkeypatch, "Number of processes must be defined.")
    with pytest.raises(UserError, match="cannot be joined .*Number of processes must be defined.*give --coordinator"):
        processes.initialize("", 0, -1)


ALONE = {
    "Kaggle": {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost"},
    "one host": {"TPU_WORKER_HOSTNAMES": "10.0.0.2"},
    "one task": {"SLURM_NTASKS": "1"},
}
SEVERAL = {
    "two hosts": {"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"},
    "tasks": {"SLURM_NTASKS": "4"},
    "slices": {"TPU_WORKER_HOSTNAMES": "10.0.0.2", "MEGASCALE_NUM_SLICES": "2"},
    "named": {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:1"},
}


def broken(monkeypatch, variables):
    """A detection that fails as it does where a metadata server is asked for and is not there."""
    for name in {name for each in (*ALONE.values(), *SEVERAL.values()) for name in each}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []

    def initialize(**arguments):
        asked.append(arguments)
        raise OSError("metadata server")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return asked


@pytest.mark.parametrize("where", ALONE)
def test_one_listed_host_is_one_process(monkeypatch, where):
    asked = broken(monkeypatch, ALONE[where])
    processes.initialize("", 0, -1)
    assert not asked, "nobody is looked for"
    with pytest.raises(UserError, match="metadata server; give --coordinator"):
        processes.initialize("", 0, -1, "on")


def test_a_detection_that_fails_is_no_cluster_where_none_is_described(monkeypatch):
    asked = broken(monkeypatch, {})
    processes.initialize("", 0, -1)
    assert asked == [{}]


@pytest.mark.parametrize("where", SEVERAL)
def test_a_detection_that_fails_is_an_error_where_several_are_described(monkeypatch, where):
    asked = broken(monkeypatch, SEVERAL[where])
    with pytest.raises(UserError, match="metadata server.*--distributed=off"):
        processes.initialize("", 0, -1)
    processes.initialize("", 0, -1, "off")
    assert len(asked) == 1
    with pytest.raises(UserError, match="contradict"):
        processes.initialize("a:1", 2, 0, "off")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_ask_one_process_to_stop(number):
    with processes.StopRequest() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)
