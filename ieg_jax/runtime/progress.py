"""Shows people how far a run is: with a bar on a terminal, with plain lines elsewhere."""

import datetime
import sys
import time

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
            self._task = self._bar.add_task("compiling", total=self._total)
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

    def step(self, done: int) -> None:
        """Moves the bar to the number of steps that are done."""
        if self._bar:
            self._bar.update(self._task, completed=done)

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
        """Shows a line of text on standard output."""
        if self._visible:
            if self._bar:
                self._bar.console.print(f"{self._title}: {text}", highlight=False, markup=False)
            else:
                print(f"{self._title}: {text}", flush=True)
