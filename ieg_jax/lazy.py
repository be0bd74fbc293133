"""TensorFlow, and what needs it, CLU and TensorBoard: loaded where first used, for they take seconds and 400 MB.

Commands check their flags and `IEGClassifier` is imported without them. jax computes on the accelerators, TensorFlow is
to leave them alone. What TensorFlow logs while it is loaded, of processors and of CUDA that is not there, is not shown,
unless TF_CPP_MIN_LOG_LEVEL is 0.
"""

import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any

_LOG_LINE = re.compile(rb"[IWE]\d{4} \d|WARNING: All log messages before absl")

# What TensorFlow reads from a bucket at once; it looks at these when it opens the first file there. Else it fetches
# 64 MB for each record that is read by its place, and keeps up to 1 GB of blocks.
OF_BUCKETS = {"GCS_READAHEAD_BUFFER_SIZE_BYTES": str(64 * 1024), "GCS_READ_CACHE_MAX_SIZE_MB": "0"}
for _variable, _value in OF_BUCKETS.items():
    os.environ.setdefault(_variable, _value)

_LOCK = threading.RLock()  # of the thread that loads


class _Lazy(types.ModuleType):
    """A module that is imported when it is first asked for something."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_imported(self.__name__), name)


@functools.cache
def _imported(name: str) -> types.ModuleType:
    with _LOCK:  # two threads that redirect standard error at once would leave it redirected
        if "tensorflow" not in sys.modules:
            with _without_log(), _without_keras():
                import tensorflow

                with contextlib.suppress(RuntimeError):  # where another program's TensorFlow has begun already
                    tensorflow.config.set_visible_devices([], "GPU")
        return importlib.import_module(name)


@contextlib.contextmanager
def _without_keras() -> Iterator[None]:
    """TensorFlow would load Keras too, in a third of its time and with 170 MB; `tf.keras` still does when asked."""
    if "keras" in sys.modules:
        yield
        return
    sys.modules["keras"] = None  # to the import system: there is none
    try:
        yield
    finally:
        del sys.modules["keras"]


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keeps lines of TensorFlow's native log from standard error; whatever else is written there follows at the end."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # jax sets it to 1
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        try:
            usual = os.dup(2)
        except OSError:  # standard error is closed
            yield
            return
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(usual, 2)
            os.close(usual)
            written.seek(0)
            for line in written:
                if not _LOG_LINE.match(line):
                    os.write(2, line)


tf, asynclib, metric_writers = map(_Lazy, ("tensorflow", "clu.asynclib", "clu.metric_writers"))
hparams = _Lazy("tensorboard.plugins.hparams.api")
