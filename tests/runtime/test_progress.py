import io
import sys
import time

import pytest

from ieg_jax.runtime import progress
from ieg_jax.runtime.progress import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Reporter("run", total=10) as reporter:
        reporter.compiled(2.4, start=0)
        reporter.step(5)
        reporter.metrics(5, {"loss": 0.123456, "test": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "run: 10 steps; compiling them first, which takes seconds to minutes",
        "run: compiled in 2 s",
        "run: step 5/10  loss 0.1235  test 0.5  ETA 0:00:00",
    ]


def test_how_long_it_takes_is_said_after_a_few_steps(capsys, monkeypatch):
    """Steps 21 to 25 after a start at step 20: the first is not counted, the other four take half a second each."""
    now, waits = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Reporter("run", total=1025) as reporter:
        reporter.compiled(2, start=20)
        for step in range(21, 40):
            now[0] += 9 if step == 21 else 0.5
            reporter.step(step, lambda step=step: waits.append(step))
    said = [line for line in capsys.readouterr().out.splitlines() if "a step" in line]
    assert said == ["run: 0.5 s a step, about 8 min for the 1,000 that are left"] and waits == [21, 25]


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Reporter("run", total=10) as reporter:
        reporter.compiled(2.4, start=0)
        reporter.step(7)
        reporter.metrics(7, {"loss": 0.5})
    shown = terminal.getvalue()
    assert "step 7/10  loss 0.5" in shown
    assert "7/10" in shown and "ETA" in shown and "training" in shown


def test_other_processes_are_silent(capsys):
    with Reporter("run", 10, visible=False) as reporter:
        reporter.metrics(5, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_eta_counts_the_steps_of_this_start(monkeypatch):
    clock = iter([0.0, 100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    reporter = Reporter("run", total=100, visible=False)
    reporter.compiled(2.4, start=50)
    assert reporter.eta(60).total_seconds() == pytest.approx(40)  # 10 steps in 10 s, 40 to go


def test_output_that_cannot_be_written_ends_no_run(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    warned = []
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(progress.logging, "warning", lambda form, *args: warned.append(form % args))
    with Reporter("run", total=10) as reporter:
        reporter.metrics(7, {"loss": 0.5})
    assert len(warned) == 1 and "standard output cannot be written (No space left on device)" in warned[0]
