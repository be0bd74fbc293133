"""The same step in TensorFlow and PyTorch: processes that wait while others are measured."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks import peer
from benchmarks.bench import measure
from benchmarks.bench.programs import Network, Step, arrays_of
from ieg_jax.methods.parts import mixup

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Absent(Exception):
    """A peer that cannot be run here; the message is a sentence for the table."""


class Peer(contextlib.AbstractContextManager):
    """A process that takes a step of another framework whenever it is asked.

    Attributes:
      version: of the framework.
    """

    def __init__(self, framework: str, interpreter: str, network: Network, arrays: dict[str, np.ndarray]):
        """Starts the process.

        Args:
          framework: tensorflow or torch.
          interpreter: a Python that has it.
          network: one that the peers have, see `peer.has`.
          arrays: what it starts from, see `peer`.

        Raises:
          Absent: where the framework cannot be imported.
        """
        self._folder = tempfile.TemporaryDirectory()
        file = pathlib.Path(self._folder.name) / "arrays.npz"
        np.savez(file, **arrays)
        command = [interpreter, "-m", f"benchmarks.peer_{framework}", f"--arrays={file}"]
        command += [f"--network={json.dumps(network.keys)}", f"--threads={measure.cores()}"]
        # OpenMP's threads, those of PyTorch, would else turn in circles for one that does not get a core: beside other
        # load its steps took ten times as long.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        self._errors = open(pathlib.Path(self._folder.name) / "errors.txt", "w+")  # noqa: SIM115 (closed with self)
        try:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError as error:
            self._close_files()
            raise Absent(f"{framework}: {interpreter} cannot be run ({error.strerror})") from None
        try:
            self.version = self._answer()["version"]
        except Absent:
            self.__exit__()
            raise

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise Absent(f"{self._process.args[2]}: {said[-1] if said else 'ended without a word'}")
        return json.loads(line)

    def step(self, case: str, out: str = "") -> dict[str, float]:
        """Has it take one step of `supervised` or `ieg`; see `peer` for the answer and for `out`."""
        print(json.dumps({"case": case, "out": out}), file=self._process.stdin, flush=True)
        return self._answer()

    def __exit__(self, *_: Any) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._close_files()

    def _close_files(self) -> None:
        self._errors.close()
        self._folder.cleanup()


def start(
    stack: contextlib.ExitStack, network: Network, step: Step, interpreters: dict[str, str]
) -> tuple[dict[str, Peer], list[str]]:
    """Starts every peer that there is for a network.

    Args:
      stack: ends them.
      network: the network.
      step: of `ieg` on it, begun; the peers take its weights and its batch.
      interpreters: framework -> Python.

    Returns:
      framework -> peer, and a sentence for each that is not there.
    """
    found, absent = {}, []
    for framework, interpreter in interpreters.items():
        try:
            found[framework] = stack.enter_context(Peer(framework, interpreter, network, arrays_of(step)))
        except Absent as error:
            absent.append(f"skipped: {error}")
    return found, absent


def interpreters(torch_python: str) -> dict[str, str]:
    """Framework -> the Python that has it, if any has; "" = this one."""
    return {"tensorflow": sys.executable, "torch": torch_python or sys.executable}


def draw_of(step: Step) -> dict[str, np.ndarray]:
    """The random choices of the first mixup of a step of `ieg`, by the paths that a peer takes."""
    config = step.config
    rng, _ = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))  # as `train.step.train_step` splits it
    draw = mixup.draw(
        rng, 1, config.batch_size, config.trusted.batch_size, blocks=3, coefficient=config.method.mixup_coefficient
    )
    return {f"draw/{name}": np.asarray(value[0]) for name, value in draw._asdict().items()}


def has(network: Network) -> bool:
    """Whether the peers have a network."""
    return peer.has(network.keys)
