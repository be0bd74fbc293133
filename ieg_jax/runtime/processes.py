"""Several processes, one on each host of a pod, that run the same program together.

jax does the work; here is what a run needs besides: that all processes start with the same configuration and data,
see the same work folder, fail together where one of them fails, and stop at the same step when one is told to stop.
"""

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ieg_jax.errors import UserError

VISIBLE_WITHIN = 10.0  # seconds that a file may take to be seen on the other hosts


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes; must come before anything else that asks jax for devices.

    Args:
      coordinator: `host:port` of process 0, where it will listen; "" = as jax finds out itself, on Cloud TPU, GKE,
        Slurm and Open MPI or from JAX_COORDINATOR_ADDRESS, and otherwise a process by itself.
      num_processes: of the run; 0 = as jax finds out.
      process_id: of this one, from 0; -1 = as jax finds out.

    Raises:
      UserError: for arguments that do not fit together, and where the others cannot be reached.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read where the devices are processors
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(given):
        _check_arguments(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif os.environ.get("SLURM_NTASKS") == "1":
        return  # jax would take one device of those that the task was given
    else:
        arguments = {}
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        if arguments or "coordinator_address" not in str(error):  # a cluster that is described in part
            raise UserError(
                f"the processes cannot be joined: {error} Give --coordinator, --num_processes and --process_id"
            ) from None
        logging.info("no cluster found (%s): a process by itself", error)
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot be joined (coordinator {coordinator or 'as detected'}): {error}"
        ) from None


def exchange(text: str) -> list[str]:
    """Every process's `text`, in the order of the processes; all must call it at the same point."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content))).ravel()
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(content)] = content
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(gathered, sizes, strict=True)]


def from_first(text: str) -> str:
    """The `text` of process 0, on all processes; all must call it at the same point."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(max(1, size), np.uint8)
    if jax.process_index() == 0:
        padded[:size] = content
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]).decode()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part of the program whose UserError on one process is raised on all; without it the others would wait.

    Raises:
      UserError: naming the processes it happened on.
    """
    message = ""
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1:
            raise
        message = str(error)
    messages = exchange(message)
    failed = [process for process, text in enumerate(messages) if text]
    if failed:
        where = f"process {failed[0]}" if len(failed) == 1 else f"processes {', '.join(map(str, failed))}"
        raise UserError(f"{where} of {len(messages)}: {messages[failed[0]]}")


def check_same(what: str, text: str) -> None:
    """Raises UserError unless `text`, e.g. the configuration, is the same on all processes."""
    texts = exchange(text)
    others = [process for process, other in enumerate(texts) if other != texts[0]]
    if others:
        raise UserError(
            f"{what} of process {others[0]} is not that of process 0 ({len(others)} of {len(texts)} differ); give all "
            f"processes the same command, and the same files"
        )


def check_shared(folder: epath.Path, flag: str) -> None:
    """Makes the folder, and raises UserError unless all processes see in it what process 0 writes."""
    first = jax.process_index() == 0
    if jax.process_count() == 1:
        return
    mark = folder / from_first(f"visible-{secrets.token_hex(8)}")
    with together():
        if first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mark.write_text("seen by all processes of a run?")
            except OSError as error:
                raise UserError(f"work folder {folder} cannot be written: {error}") from None
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, answer in enumerate(exchange("sees" if seen else "")) if not answer]
    if first:
        mark.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{flag}={folder} is not one folder for all: process {blind[0]} does not see what process 0 writes there "
            f"({len(blind)} of {jax.process_count()} do not); use a path that all hosts share, such as gs://… or a "
            f"network disk"
        )


class StopRequest:
    """SIGTERM or SIGINT to any process, turned into a step at which all of them stop. A context manager."""

    def __init__(self):
        self._asked = threading.Event()
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            # SIGTERM is jax's: its preemption service tells the other processes. Ctrl-C takes the same way.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._ask)
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether the run is to stop after `step`; all processes ask after each step and get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def _ask(self, *_) -> None:
        self._asked.set()
        self._restore()  # a second one acts as usual

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _check_arguments(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"--coordinator={coordinator}: expected host:port of process 0, such as 10.0.0.2:1234")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: expected how many processes there are, with --coordinator")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: expected 0 to {num_processes - 1}, another for each process")
