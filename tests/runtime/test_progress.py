import io
import sys
import time

import pytest

from ieg_jax.runtime.progress import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Reporter("run", total=10) as reporter:
        reporter.compiled(2.4, start=0)
        reporter.step(5)
        reporter.metrics(5, {"loss": 0.123456, "test": 0.5})
    assert capsys.readouterr().out == "run: compiled in 2 s\nrun: step 5/10  loss 0.1235  test 0.5  ETA 0:00:00\n"


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
