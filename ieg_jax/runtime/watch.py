"""Where the time of a run goes, and what it does when it does nothing: a clock, profiler traces, a watchdog."""

import contextlib
import faulthandler
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import hardware
from ieg_jax.config import at_least


def validate(config: ConfigDict) -> None:
    """Raises UserError for a value of `profile` and `stall_minutes` that is not allowed."""
    checks = {
        "profile.start_step": at_least(0, "0 or a step, counted from 1"),
        "profile.num_steps": at_least(1),
        "stall_minutes": at_least(0, "0 or a number of minutes"),
    }
    config_lib.check_values(config, checks)


class Clock:
    """Wall time of the training loop, divided among its parts.

    The parts are those of the Python loop. Steps are dispatched ahead of the device, so waiting for the device
    shows up where the loop needs a result; that wait belongs to `compute`. `data` is time in which the loop had no
    batch to dispatch: where it is near 0 the input pipeline keeps up.
    """

    def __init__(self, *parts: str):
        """All parts start at 0."""
        self._seconds = dict.fromkeys(parts, 0.0)
        self._began = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts the time of a with-block as that of `part`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - began

    def waiting(self, part: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items; the time that each takes to come counts as that of `part`."""
        iterator = iter(items)
        while True:
            with self(part):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last lap, in all and of each part, `other` being the rest; begins a new lap."""
        now = time.monotonic()
        total, parts = now - self._began, dict(self._seconds)
        parts["other"] = max(0.0, total - sum(parts.values()))
        self._began, self._seconds = now, dict.fromkeys(self._seconds, 0.0)
        return total, parts


def flops_utilization(flops_per_step: float, seconds_per_step: float) -> float | None:
    """The share of the peak compute that the steps use, by XLA's count of the operations of one device's program.

    Also called MFU. None where the peak of these devices is not known, as it is for processors.
    """
    chip = hardware.chip(jax.devices()[0].device_kind)
    return flops_per_step / seconds_per_step / chip.peak_flops if chip and seconds_per_step > 0 else None


class Profiler:
    """Traces some steps for TensorBoard's profiler: from a step on, or when a file asks for it.

    The file is `PROFILE` in the work folder (`touch run/PROFILE`); it is looked for by `asked`, and removed. Process 0
    traces itself, which on a pod is one host with its chips.
    """

    def __init__(self, folder: epath.Path, start_step: int, num_steps: int):
        """Traces go to `folder`/plugins/profile, steps `start_step` (0 = none) and `num_steps` − 1 after it."""
        self._folder, self._num_steps = folder, num_steps
        self._start, self._stop = start_step, None
        self._acts = jax.process_index() == 0

    def asked(self, step: int) -> bool:
        """Looks for the file; where it is, the trace begins with the step after `step`."""
        request = self._folder / "PROFILE"
        if not self._acts or self._stop is not None or not request.exists():
            return False
        request.unlink()
        self._start = step + 1
        return True

    def before(self, step: int) -> None:
        """To be called before a step is dispatched."""
        if self._acts and step == self._start and self._stop is None:
            jax.profiler.start_trace(str(self._folder))
            self._stop = step + self._num_steps - 1

    def after(self, step: int, result: Any) -> bool:
        """To be called after a step is dispatched, with something it computes; True where a trace was written."""
        if self._stop is None or step < self._stop:
            return False
        jax.block_until_ready(result)  # the device works behind the loop
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is going on."""
        if self._stop is not None:
            jax.profiler.stop_trace()
            self._stop = None


class Watchdog:
    """Writes down the stacks of all threads when no step is finished for too long. A context manager.

    The usual reasons are a host that waits for another one, a bucket that does not answer, and data that stopped
    coming; the stacks tell them apart. The run is not ended: what it waits for may come.
    """

    def __init__(self, folder: epath.Path, minutes: float):
        """Stacks go to standard error and to `folder`/stalled-<process>.txt; 0 minutes = never."""
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
        """To be called after each step, and before and after anything that takes long."""
        self._last, self._told = time.monotonic(), False

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self._seconds / 4)):
            idle = time.monotonic() - self._last
            if idle >= self._seconds and not self._told:
                self._told = True
                self._tell(idle)

    def _tell(self, idle: float) -> None:
        path = self._folder / f"stalled-{jax.process_index()}.txt"
        text = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {jax.process_index()}: no step was finished for "
            f"{idle / 60:.1f} minutes\n{_stacks()}"
        )
        print(f"{text}(also in {path})", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the storage may be what is gone
            path.write_text(text)


def _stacks() -> str:
    """The stacks of all threads, the newest call first."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to real files only
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def enable_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, so that a restarted run need not compile again.

    Args:
      folder: path, local or on a bucket; "" = none.
    """
    if not folder:
        return
    path = pathlib.Path(folder).expanduser() if "://" not in folder else folder
    jax.config.update("jax_compilation_cache_dir", str(path))
