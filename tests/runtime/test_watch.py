"""The clock, the utilisation, the watchdog and the profiler."""

import pathlib
import time
import types

import jax
import pytest
from etils import epath

from ieg_jax import hardware
from ieg_jax.runtime import watch


def test_the_clock_divides_the_time_among_its_parts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = watch.Clock("data", "compute")

    for _ in range(2):
        with clock("data"):
            now[0] += 2.25
        with clock("compute"):
            now[0] += 3.0
        now[0] += 0.25
    assert clock.lap() == (11.0, {"data": 4.5, "compute": 6.0, "other": 0.5})
    now[0] += 1.0
    assert clock.lap() == (1.0, {"data": 0.0, "compute": 0.0, "other": 1.0})


def test_utilization_by_hand(monkeypatch):
    assert watch.flops_utilization(1e12, 1.0) is None, "nobody publishes the peak of these devices"
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v4")])
    assert watch.flops_utilization(55e12, 0.5) == pytest.approx(110 / 275)


def test_chips_are_known_by_their_kind():
    assert hardware.chip("TPU v5 lite").name == "v5e"
    assert hardware.chip("TPU v6 lite").memory_bytes == 32 * 2**30
    assert hardware.chip("cpu") is None


def test_a_stalled_step_is_told_with_stacks(tmp_path, capsys):
    folder = epath.Path(tmp_path)

    def wait_for_the_other_hosts():
        deadline = time.monotonic() + 30
        while not (tmp_path / "stalled-0.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    with watch.Watchdog(folder, minutes=0.5 / 60):
        wait_for_the_other_hosts()
    text = (tmp_path / "stalled-0.txt").read_text()
    assert "process 0: no step was finished for 0.0 minutes" in text
    assert "in wait_for_the_other_hosts" in text, "the stack of the thread that waits"
    assert "no step was finished" in capsys.readouterr().err


def test_a_watchdog_is_silent_while_steps_are_finished(tmp_path, capsys):
    with watch.Watchdog(epath.Path(tmp_path), minutes=1 / 60) as watchdog:
        for _ in range(20):
            time.sleep(0.1)
            watchdog.alive()
    with watch.Watchdog(epath.Path(tmp_path), minutes=0):
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


class Traces:
    """Stands for jax's profiler and notes when it is on."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: self.calls.append(("start", folder)))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self.calls.append(("stop",)))


def steps_traced(profiler, steps, ask_at=None):
    """The steps in which a trace was going on, and those that the profiler reports as its last."""
    ended = []
    for step in steps:
        profiler.before(step)
        if profiler.after(step, None):
            ended.append(step)
        if step == ask_at:
            profiler.look(step)
    return ended


def test_traces_by_key_and_by_file(tmp_path, monkeypatch):
    traces = Traces(monkeypatch)
    profiler = watch.Profiler(epath.Path(tmp_path), start_step=3, num_steps=2)
    profiler.look(0)
    assert steps_traced(profiler, range(1, 6)) == [4], "steps 3 and 4"
    (tmp_path / "PROFILE").touch()
    assert steps_traced(profiler, range(6, 12), ask_at=8) == [10], "steps 9 and 10"
    assert not (tmp_path / "PROFILE").exists(), "one trace for each time the file is made"
    assert traces.calls == [("start", str(tmp_path)), ("stop",)] * 2


def test_a_trace_that_is_going_on_is_closed(tmp_path, monkeypatch):
    traces = Traces(monkeypatch)
    profiler = watch.Profiler(epath.Path(tmp_path), start_step=1, num_steps=10)
    profiler.before(1)
    profiler.close()
    profiler.close()
    assert [call[0] for call in traces.calls] == ["start", "stop"]


def test_other_processes_do_not_trace(tmp_path, monkeypatch):
    traces = Traces(monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    profiler = watch.Profiler(epath.Path(tmp_path), start_step=1, num_steps=1)
    (tmp_path / "PROFILE").touch()
    profiler.before(1)
    assert not profiler.after(1, None)
    profiler.look(1)
    assert traces.calls == [] and (tmp_path / "PROFILE").exists()


def test_programs_that_a_processor_could_not_load_again_are_not_kept(monkeypatch):
    def kept():
        return set(pathlib.Path(jax.config.jax_compilation_cache_dir).glob("jit_of_this_test_alone*-cache"))

    def lowered():
        def of_this_test_alone(x):
            return jax.numpy.sin(x) + time.monotonic()  # another program each time

        return jax.jit(of_this_test_alone).lower(1.0)

    assert not kept()
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        monkeypatch.setattr(watch, "LARGEST_KEPT", 1)
        assert watch.compile_step(lowered())(1.0) > 0
        assert not kept() and jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
        monkeypatch.setattr(watch, "LARGEST_KEPT", 100)
        watch.compile_step(lowered())
        assert kept()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
        for entry in kept():
            entry.unlink()
