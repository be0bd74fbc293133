"""Shows people how far a run is: with a bar on a terminal, with plain lines elsewhere."""

import datetime
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ieg_jax.errors import drop_output, first_line

TIMED = 4  # steps after the first, which begins slowly
WORTH_SAYING = 50  # steps; of fewer it is not said how long they will take


def duration_text(seconds: float) -> str:
    """A duration as people say it: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{max(1, round(seconds))} s"


class Reporter:
    """Shows the progress of a run. It is a context manager."""

    def __init__(self, title: str, total: int, visible: bool = True):
        """Prepares the bar; nothing is shown before the context is entered.

        Args:
          title: name of the run, at the beginning of each line.
          total: number of steps of the run.
          visible: False = nothing is shown but warnings, as on all processes but the first.
        """
        self._title, self._start, self._total = title, 0, total
        self._first_done = None  # when the first step was done; None = not yet
        self._visible = visible
        self._began = time.monotonic()
        self._bar = None
        if visible and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(),
            )

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("compiling the step (seconds to minutes)", total=self._total)
        else:
            self.say(f"{self._total:,} steps; compiling them first, which takes seconds to minutes")
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def compiled(self, seconds: float, start: int) -> None:
        """Says that compilation took so many seconds. The ETA counts from here, with `start` steps done before."""
        self._began, self._start = time.monotonic(), start
        if self._bar:
            self._bar.update(self._task, description="training", completed=start)
        self.say(f"compiled in {seconds:.0f} s")

    def step(self, done: int, wait: Callable[[], Any] = lambda: None) -> None:
        """Moves the bar to the number of steps that are done; after a few it says how long all will take.

        Args:
          done: steps.
          wait: until they really are.
        """
        if self._bar:
            self._bar.update(self._task, completed=done)
        count = done - self._start
        if count in (1, 1 + TIMED) and self._total - self._start > WORTH_SAYING:
            wait()
            if count == 1:
                self._first_done = time.monotonic()
            else:
                each = (time.monotonic() - self._first_done) / TIMED
                left = duration_text(each * (self._total - done))
                self.say(f"{each:.2g} s a step, about {left} for the {self._total - done:,} that are left")

    def metrics(self, done: int, values: dict[str, float]) -> None:
        """Shows the metrics of the step `done`, which was logged: name -> value."""
        note = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {done}/{self._total}  {note}" + ("" if self._bar else f"  ETA {self.eta(done)}"))

    def eta(self, done: int) -> datetime.timedelta:
        """Returns the time that is left, at the mean speed since compilation."""
        elapsed = time.monotonic() - self._began
        seconds = elapsed * (self._total - done) / max(done - self._start, 1)
        return datetime.timedelta(seconds=round(seconds))

    def warn(self, text: str) -> None:
        """Logs a warning, which appears on standard error, on every process."""
        logging.warning("%s: %s", self._title, text)

    def say(self, text: str) -> None:
        """Shows a line of text on standard output; where that cannot be written any more, the run goes on without."""
        if not self._visible:
            return
        try:
            if self._bar:
                self._bar.console.print(f"{self._title}: {text}", highlight=False, markup=False)
            else:
                print(f"{self._title}: {text}", flush=True)
        except OSError as error:
            self._visible = False
            drop_output()
            self.warn(
                f"standard output cannot be written ({first_line(error)}), nothing more is shown; the run goes on"
            )
