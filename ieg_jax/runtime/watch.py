"""Measures where the time of a run goes, traces steps for the profiler, and notices when a run stands still."""

import contextlib
import faulthandler
import math
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files, hardware
from ieg_jax.config import at_least
from ieg_jax.errors import first_line
from ieg_jax.runtime import allocation


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value of the group `profile`, or of `stall_minutes`, that is not allowed."""
    checks = {
        "profile.start_step": at_least(0, "0 or a step, counted from 1"),
        "profile.num_steps": at_least(1),
        "stall_minutes": at_least(0, "0 or a number of minutes"),
    }
    config_lib.check_values(config, checks)


class Clock:
    """Divides the wall time of the training loop among parts of its Python code.

    The loop hands steps to the device before earlier ones are finished. It waits for the device only where it needs a
    result, and counts this wait as `compute`. The part `data` is the time in which the loop waited for a batch: where
    it is near 0, the input pipeline is fast enough.
    """

    def __init__(self, *parts: str):
        """Starts the first lap, in which each of the parts has taken 0 seconds."""
        self._seconds = dict.fromkeys(parts, 0.0)
        self._began = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time of a with-block for `part`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - began

    def lap(self) -> tuple[float, dict[str, float]]:
        """Ends a lap and begins the next one.

        Returns:
          Seconds since the last lap: in all, and of each part, where `other` is the rest.
        """
        now = time.monotonic()
        total, parts = now - self._began, dict(self._seconds)
        parts["other"] = max(0.0, total - sum(parts.values()))
        self._began, self._seconds = now, dict.fromkeys(self._seconds, 0.0)
        return total, parts


def flops_utilization(flops_per_step: float, seconds_per_step: float) -> float | None:
    """Returns the share of the devices' peak compute that the steps use, also called MFU.

    Args:
      flops_per_step: operations of one device in a step, by XLA's count.
      seconds_per_step: seconds of wall time.

    Returns:
      None where the peak of these devices is not known, as for processors.
    """
    chip = hardware.chip(jax.devices()[0].device_kind)
    return flops_per_step / seconds_per_step / chip.peak_flops if chip and seconds_per_step > 0 else None


class Profiler:
    """Traces some steps for TensorBoard's profiler, from a given step on or when a file asks for it.

    The file is `PROFILE` in the work folder (`touch run/PROFILE`). `look` looks for it, and removes it. Only process 0
    makes traces; on a pod they show its host, with the chips of this host.
    """

    def __init__(self, folder: epath.Path, start_step: int, num_steps: int):
        """Prepares to trace; nothing is traced yet.

        Args:
          folder: the work folder. Traces are written to plugins/profile in it.
          start_step: the first step that is traced; 0 = none until the file asks for it.
          num_steps: how many steps a trace has.
        """
        self._folder, self._num_steps = folder, num_steps
        self._start, self._stop = start_step, None
        self._acts = jax.process_index() == 0

    def look(self, step: int) -> None:
        """Looks for the file after `step`; where it is there, a trace begins with the next step."""
        request = self._folder / "PROFILE"
        with self._without_harm():
            if self._acts and self._stop is None and request.exists():
                request.unlink()
                self._start = step + 1

    def before(self, step: int) -> None:
        """Starts a trace if it is to begin with `step`. Must be called before each step."""
        if self._acts and step == self._start and self._stop is None:
            with self._without_harm():
                jax.profiler.start_trace(str(self._folder))
                self._stop = step + self._num_steps - 1

    def after(self, step: int, result: Any) -> bool:
        """Ends a trace if `step` is its last. Must be called after each step.

        Args:
          step: the step that was dispatched.
          result: something that the step computes.

        Returns:
          Whether a trace was written.
        """
        if self._stop is None or step < self._stop:
            return False
        jax.block_until_ready(result)  # the device may still be computing the step
        return self.close()

    def close(self) -> bool:
        """Ends a trace if one is going on; returns whether it was written."""
        if self._stop is None:
            return False
        self._stop = None
        with self._without_harm():
            jax.profiler.stop_trace()
            return True
        return False

    @contextlib.contextmanager
    def _without_harm(self):
        """A profile that cannot be written is a warning and no end of the run."""
        try:
            yield
        except Exception as error:  # of the profiler's, of TensorFlow's or of the system's kinds
            logging.warning("no profile is written to %s: %s", self._folder, first_line(error))


class Watchdog:
    """Writes down the stacks of all threads when no step is finished for too long. It is a context manager.

    Usually a host then waits for another one, a bucket does not answer, or no more data come. The stacks say which. The
    run is not ended, because what it waits for may still come.
    """

    def __init__(self, folder: epath.Path, minutes: float):
        """Prepares to watch; the watch begins with the context.

        Args:
          folder: the work folder. Stacks are written to stalled-<process>.txt in it, and to standard error.
          minutes: how long no step may be finished; 0 = for ever.
        """
        self._folder, self._seconds = folder, 60 * minutes
        self._last, self._told = time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()

    def alive(self) -> None:
        """Says that the run goes on. Must be called after each step, and before and after anything that takes long."""
        self._last, self._told = time.monotonic(), False

    def _watch(self) -> None:
        """Looks several times in the allowed time whether the run goes on; this runs in a thread of its own."""
        while not self._over.wait(min(5.0, self._seconds / 4)):
            idle = time.monotonic() - self._last
            if idle >= self._seconds and not self._told:
                self._told = True
                self._tell(idle)

    def _tell(self, idle: float) -> None:
        """Writes the stacks down, `idle` seconds after the last sign of life."""
        path = self._folder / f"stalled-{jax.process_index()}.txt"
        text = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {jax.process_index()}: no step was finished for "
            f"{idle / 60:.1f} minutes\n{_stacks()}"
        )
        print(f"{text}(also in {path})", file=sys.stderr, flush=True)
        with contextlib.suppress(*files.storage_errors()):  # the run may be waiting because its storage is gone
            path.write_text(text)


def _stacks() -> str:
    """Returns the stacks of all threads as text, with the newest call first."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler can only write to a real file
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


# XLA:CPU loads a kept program on a thread with a stack of 2 MB, where LLVM's linker calls itself for every object that
# refers to another. How deep it goes is not known before: with jax 0.10.2 the train step of `ieg` that fine-tunes
# EfficientNet-Lite0 (87,000 operations) ended the process with a segmentation fault; those of Inception-ResNet-v2
# (`supervised`, 87,000) and ConvNeXt-T (`ieg`, 241,000) did not, nor did six smaller ones.
LARGEST_KEPT = 60_000  # operations


def enable_compilation_cache(folder: str) -> None:
    """Lets jax keep compiled programs in a folder, so that a run that is started again need not compile them.

    Args:
      folder: the folder, local or on a bucket; "" = none.
    """
    if not folder:
        return
    path = pathlib.Path(folder).expanduser() if "://" not in folder else folder
    jax.config.update("jax_compilation_cache_dir", str(path))


def compile_step(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a train step; on a processor one of more than LARGEST_KEPT operations is not kept in the cache."""
    compiled = _compile(lowered)
    allocation.keep_freed()
    return compiled


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    if jax.default_backend() != "cpu" or lowered.as_text().count(" = ") <= LARGEST_KEPT:
        return lowered.compile()
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # so nothing is written, nor found later
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)
