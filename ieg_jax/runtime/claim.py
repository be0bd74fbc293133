"""Keeps two runs from writing in one work folder.

A run holds its folder by the file running.json, whose `beat` it changes every few seconds. Another start in the same
folder finds the file, and is refused while the holder lives. Where the holder has died without a word (kill -9, a
machine that is gone), the next start takes the folder over: at once where the holder was a process of this machine,
which can be asked for, else after it has watched for a while that the beat stands still. This takes no more of a file
system than that a file is read as it was last written, so it holds on network disks and on buckets. Should two starts
take a free folder in the same moment, the later one has it; the other one notices at its next beat and stops.

Two more files say of a folder that nobody holds what its run is: queued.json, which whoever submits a job for it writes
and the job's start removes, and failed.json, which a run leaves that ends by an error. See `sign_of_life`.
"""

import contextlib
import os
import pathlib
import platform
import secrets
import threading
import time
from typing import Any

import psutil
from absl import logging
from etils import epath

from ieg_jax import files
from ieg_jax.errors import Interrupted, StorageError, UserError, first_line

FILE = "running.json"
QUEUED = "queued.json"
FAILED = "failed.json"
BEAT_SECONDS = 15.0
WATCH_SECONDS = 45.0  # how long a beat must stand still before its run counts as dead
OLD_SECONDS = 600.0  # a beat older than this by the clock needs no watching; no clocks differ by so much


class Claim:
    """The right to write in a work folder; a context manager at whose end it is given back."""

    def __init__(self, folder: epath.Path):
        """Does nothing yet. The folder exists."""
        self._file = folder / FILE
        place = str(folder) if files.is_remote(folder) else os.path.realpath(folder)
        self._me = {"run": secrets.token_hex(8), **_this_process(), "folder": place}
        self._end = threading.Event()
        self._taken_by = ""
        self._beats = threading.Thread(target=self._beat, name="claim", daemon=True)

    def take(self) -> None:
        """Takes the folder, perhaps after `WATCH_SECONDS`.

        Raises:
          UserError: where another run holds it.
          StorageError: where the file cannot be written.
        """
        holder = self._read()
        if holder and self._lives(holder):
            raise UserError(
                f"{self._file.parent} is in use: {_in_words(holder)} is running in it, and two runs would spoil each "
                f"other's files; wait for its end or stop it, or use another work folder"
            )
        self._write()
        with contextlib.suppress(*files.storage_errors()):
            for name in (QUEUED, FAILED):
                (self._file.parent / name).unlink(missing_ok=True)
        self._beats.start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not self._beats.ident:
            return  # nothing was taken
        self._end.set()
        self._beats.join()
        with contextlib.suppress(*files.storage_errors(), StorageError):
            if (self._read() or {}).get("run") == self._me["run"]:
                if isinstance(error, Exception) and not isinstance(error, Interrupted):
                    files.write_json(self._file.parent / FAILED, {"error": first_line(error), "time": time.time()})
                self._file.unlink()

    def check(self) -> None:
        """Raises UserError where another run has taken the folder, as it may after this one was suspended for long."""
        if self._taken_by:
            raise UserError(
                f"{self._taken_by} has taken over {self._file.parent} while this run gave no sign of life; this one "
                f"stops here, and the other goes on"
            )

    def may_be_held(self) -> bool:
        """Whether a run holds the folder, without watching: one of another machine may have died `OLD_SECONDS` ago."""
        holder = self._read()
        return holder is not None and self._seems_alive(holder) is not False

    def _seems_alive(self, holder: dict[str, Any]) -> bool | None:
        """Whether a holder is alive; None where only watching it would tell."""
        if holder.get("machine") == self._me["machine"]:
            # A file of another place was copied together with the folder in which its run is at work.
            return holder["folder"] == self._me["folder"] and _is_running(holder["pid"], holder["started"])
        return False if time.time() - holder.get("time", 0.0) > OLD_SECONDS else None

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Whether a holder is alive; this may take `WATCH_SECONDS`."""
        alive = self._seems_alive(holder)
        if alive is not None:
            return alive
        logging.warning(
            "%s was running in %s a moment ago; watching for %.0f s whether it still is",
            _in_words(holder), self._file.parent, WATCH_SECONDS,
        )  # fmt: skip
        until = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT_SECONDS))
            now = self._read()
            if now and now.get("beat") != holder.get("beat"):
                return True
            if not self._file.exists():
                return False
        return False

    def _beat(self) -> None:
        """Changes the file now and then, until the end or until it is another's."""
        while not self._end.wait(BEAT_SECONDS):
            # A storage that fails is for those who need it to say.
            with contextlib.suppress(*files.storage_errors(), StorageError):
                holder = self._read()
                if holder and holder.get("run") != self._me["run"]:
                    self._taken_by = _in_words(holder)
                    return
                self._write()

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where there is none, or no whole one."""
        try:
            content = files.read_json(self._file)
        except (FileNotFoundError, UserError):
            return None
        return content if isinstance(content, dict) and content.keys() >= self._me.keys() else None

    def _write(self) -> None:
        """Writes the file with another beat."""
        files.write_json(self._file, self._me | {"beat": secrets.token_hex(4), "time": time.time()})


def sign_of_life(folder: epath.Path) -> str:
    """Says from the files of a work folder what its run is: `running`, `queued`, `failed`, or "" for none of these.

    A run of another machine counts as running until its beat is `OLD_SECONDS` old.
    """
    if Claim(folder).may_be_held():
        return "running"
    return next((file.partition(".")[0] for file in (QUEUED, FAILED) if (folder / file).exists()), "")


def last_error(folder: epath.Path) -> str:
    """The error by which the run of a work folder ended, in one line; "" where its file does not say."""
    try:
        return str(files.read_json(folder / FAILED)["error"])
    except (FileNotFoundError, KeyError, TypeError, UserError):
        return ""


def _this_process() -> dict[str, Any]:
    """What tells this process from all others, on all machines, so far as the system says it."""
    marks, pid = [platform.node()], os.getpid()
    with contextlib.suppress(OSError):  # other systems than Linux
        marks.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(os.readlink("/proc/self/ns/pid"))  # a container numbers its processes by itself
    started = psutil.Process(pid).create_time()
    return {"host": marks[0], "machine": " ".join(marks), "pid": pid, "started": started}


def _is_running(pid: int, started: float) -> bool:
    """Whether a process of this machine that began at a time is there still, and not another one of its number."""
    try:
        process = psutil.Process(pid)
        # The system counts from when it was booted, and it may set the clock right by a second in between.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2.0
    except psutil.Error:
        return False


def _in_words(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"
