"""Lets several processes, such as one on each host of a TPU pod, run the same program together.

jax joins the processes and exchanges arrays. This module adds what a run needs besides: all processes start with the
same configuration and data, they see the same work folder, they all fail where one fails, and they all stop at the same
step when one is told to stop.
"""

import contextlib
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ieg_jax import files
from ieg_jax.cli import UNENDING
from ieg_jax.errors import Interrupted, UserError, check_choice, first_line

VISIBLE_WITHIN = 10.0  # seconds until a file that one host has written must be seen on the others


def initialize(coordinator: str, num_processes: int, process_id: int, distributed: str = "auto") -> None:
    """Joins the processes. This must come before anything that asks jax for devices.

    Where no argument is given, jax finds out by itself: on Cloud TPU, GKE, Slurm and Open MPI, and from the environment
    variable JAX_COORDINATOR_ADDRESS. If it finds nothing, or one host alone is listed, this process runs alone.

    Args:
      coordinator: `host:port` at which process 0 will listen; "" = not given.
      num_processes: how many processes there are; 0 = not given.
      process_id: the number of this process, from 0; -1 = not given.
      distributed: auto; on = it is an error if nothing is found; off = this process runs alone whatever is found.

    Raises:
      UserError: for arguments that do not fit together, and where the other processes cannot be reached.
    """
    check_choice("--distributed", distributed, ("auto", "on", "off"))
    if distributed == "off":
        if coordinator:
            raise UserError(f"--distributed=off and --coordinator={coordinator} contradict each other; drop one")
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # jax reads this only where it uses processors
    given = (bool(coordinator), num_processes > 0, process_id >= 0)
    if any(given):
        _check_arguments(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    elif distributed == "auto" and _is_listed_alone(os.environ):
        return
    else:
        arguments = {}
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:  # of the description of a cluster, and of whatever asks a cloud for it
        # jax asks for the coordinator's address where nothing describes a cluster. Another ValueError is a mistake in
        # the description; all else is of asking for one, which fails in many ways where there is none.
        is_value = isinstance(error, ValueError)
        nothing = "coordinator_address" in str(error) if is_value else not _is_described(os.environ)
        if not arguments and distributed == "auto" and nothing:
            logging.info("no cluster found (%s): a process by itself", error)
            return
        raise UserError(
            f"the processes cannot be joined (coordinator {coordinator or 'as detected'}): {first_line(error)}; give "
            f"--coordinator, --num_processes and --process_id, or --distributed=off for a process by itself"
        ) from None


def _is_listed_alone(variables: Mapping[str, str]) -> bool:
    """Whether the environment lists one host, as in a container with a TPU of its own (Colab, Kaggle), or one task.

    jax would look for other hosts of a TPU there, and use only one of the devices that Slurm gave to a task.
    """
    hosts = [variables.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")]
    listed = [host for host in hosts if host]
    one_host = bool(listed) and all("," not in host for host in listed) and "MEGASCALE_NUM_SLICES" not in variables
    return one_host or variables.get("SLURM_NTASKS") == "1"


def _is_described(variables: Mapping[str, str]) -> bool:
    """Whether the environment says that there are several processes."""
    several = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
    sizes = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES", "MEGASCALE_NUM_SLICES")
    return (
        any(variables.get(name) for name in several)
        or any(variables.get(name, "1") not in ("", "1") for name in sizes)
        or "," in variables.get("TPU_WORKER_HOSTNAMES", "")
    )


def exchange(text: str) -> list[str]:
    """Returns the `text` of every process, in order. All processes must call this at the same point."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content))).ravel()
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(content)] = content
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(gathered, sizes, strict=True)]


def from_first(text: str) -> str:
    """Returns the `text` of process 0 on all processes. All processes must call this at the same point."""
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
    """Raises a UserError that happens inside the context on one process on all of them.

    Without it the others would go on and wait for that process for ever. All processes must enter it.

    Raises:
      UserError: names the processes on which it happened.
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
    """Raises UserError unless `text` is the same on all processes; `what` says in the message what it is."""
    texts = exchange(text)
    others = [process for process, other in enumerate(texts) if other != texts[0]]
    if others:
        raise UserError(
            f"{what} of process {others[0]} is not that of process 0 ({len(others)} of {len(texts)} differ); give all "
            f"processes the same command, and the same files"
        )


def check_shared(folder: epath.Path, flag: str) -> None:
    """Raises UserError unless all processes see in `folder` what process 0 writes there.

    Where several processes run, process 0 makes the folder if it is missing. `flag` is the folder's flag, for the
    message.
    """
    first = jax.process_index() == 0
    if jax.process_count() == 1:
        return
    mark = folder / from_first(f"visible-{secrets.token_hex(8)}")
    with together():
        if first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                mark.write_text("seen by all processes of a run?")
            except files.storage_errors() as error:
                raise UserError(f"work folder {folder} cannot be written: {first_line(error)}") from None
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
    """Turns SIGTERM, SIGINT or SIGHUP to any process into a step at which all stop. It is a context manager."""

    def __init__(self):
        """Changes nothing yet; signals are handled inside the context."""
        self._asked = threading.Event()
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            # jax handles SIGTERM: its preemption service tells the other processes. Ctrl-C is turned into a SIGTERM.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        else:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._ask)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it: then the run outlives the terminal
            handlers[signal.SIGHUP] = handlers[signal.SIGINT]
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Returns whether the run must stop after `step`. All processes ask after each step and get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def wait(self, function: Callable[[], Any]) -> Any:
        """Calls a function that does not come back to Python for long, and returns what it returns.

        One process does so in a thread, so that a signal is heard in the meantime; the thread cannot be ended, and the
        program leaves it behind (`cli.run`). Several processes, which have to stop together, wait for the end.

        Raises:
          Interrupted: after a signal.
        """
        if jax.process_count() > 1:
            return function()
        results: queue.SimpleQueue = queue.SimpleQueue()

        def call():
            try:
                results.put((function(), None))
            except BaseException as error:  # which the caller raises
                results.put((None, error))

        threading.Thread(target=call, name=UNENDING, daemon=True).start()
        while not self._asked.is_set():
            with contextlib.suppress(queue.Empty):
                found, error = results.get(timeout=0.2)
                if error is not None:
                    raise error
                return found
        raise Interrupted("stopped while a program was being compiled; nothing is lost")

    def _ask(self, *_) -> None:
        """Handles the signal."""
        self._asked.set()
        self._restore()  # so that a second signal ends the process at once

    def _restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _check_arguments(coordinator: str, num_processes: int, process_id: int) -> None:
    """Raises UserError unless the arguments of `initialize` fit together."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"--coordinator={coordinator}: expected host:port of process 0, such as 10.0.0.2:1234")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: expected how many processes there are, with --coordinator")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: expected 0 to {num_processes - 1}, another for each process")
