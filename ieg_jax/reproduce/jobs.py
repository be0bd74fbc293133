"""Runs experiments as processes, several at a time, or all in this one, or submits them to a cluster."""

import collections
import concurrent.futures
import dataclasses
import gc
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
from etils import epath
from rich.console import Console

from ieg_jax import cli, models
from ieg_jax.errors import NonFiniteError, UserError
from ieg_jax.reproduce import results, submit
from ieg_jax.reproduce.experiments import Experiment
from ieg_jax.runtime import allocation, watch

# The keys that --scale=tiny sets. Networks whose size can be chosen become small.
TINY = {
    "batch_size": 16,
    "num_train_epochs": 0.0,
    "num_train_steps": 20,
    "schedule.first_cycle_epochs": 0.0,
    "schedule.first_cycle_steps": 20,
    "log_every_epochs": 0.0,
    "log_every_steps": 10,
    "eval_every_epochs": 0.0,
    "eval_every_steps": 20,
    "checkpoint_every_epochs": 0.0,
    "checkpoint_every_steps": 20,
    "model.width": 1 / 16,
}


@dataclasses.dataclass(frozen=True)
class Changes:
    """What the flags --scale, --set and --foreign change in every experiment.

    Attributes:
      tiny: whether networks are small and steps are few, see TINY.
      keys: texts `key=value`, each a key of the configuration that is set; one that says where data are only in
        experiments that need it.
      foreign: texts `name:folder`, each a source of open-set noise and where its images are.
    """

    tiny: bool = False
    keys: Sequence[str] = ()
    foreign: Sequence[str] = ()

    def of(self, experiment: Experiment) -> Experiment:
        """Returns the experiment with the changes.

        Raises:
          UserError: for a text in `keys` that is not key=value, for a key that does not exist or is neither a text nor
            a number, and for a value of another type than the key's.
        """
        keys = dict(experiment.keys)
        if "noise.open_set" in keys:
            places = {place.partition(":")[0]: place for place in self.foreign}
            keys["noise.open_set"] = ",".join(places.get(name, name) for name in keys["noise.open_set"].split(","))
        if self.tiny:
            keys |= TINY | ({"model.depth": 10} if "model=wrn" in experiment.config else {})
        known = results.flat(results.load_config(experiment, 0).to_dict()) if self.keys else {}
        for pair in self.keys:
            key, separator, value = pair.partition("=")
            if not separator or key not in known:
                raise UserError(f"--set={pair}: expected key=value with a key of configs/default.py")
            if key in results.LOCATIONS and experiment.needs and key not in experiment.needs:
                continue  # it is for other rows of the table
            kind = type(known[key])
            if kind not in (str, int, float):
                raise UserError(f"--set={pair}: expected the key of a text or a number")
            try:
                keys[key] = kind(value)
            except ValueError:
                raise UserError(f"--set={pair}: expected {kind.__name__}") from None
        if self.tiny:  # a key of TINY that the network does not read would be refused
            network = results.load_config(experiment, 0).model.name
            reads = {f"model.{key}" for key in models.REGISTRY[network].READS}
            keys = {key: value for key, value in keys.items() if key not in TINY or key[:6] != "model." or key in reads}
        return dataclasses.replace(experiment, keys=keys)


def check_places(changes: Changes, wanted: Iterable[Experiment]) -> None:
    """Raises UserError for a place of data in `changes` that no experiment needs, though they need others."""
    needed = {key for experiment in wanted for key in experiment.needs}
    for pair in changes.keys:
        key = pair.partition("=")[0]
        if needed and key in results.LOCATIONS and key not in needed:
            raise UserError(f"--set={pair}: nothing here reads it; the experiments need {', '.join(sorted(needed))}")


def command_line(experiment: Experiment, seed: int, folder: epath.Path, keep_memory: bool = False) -> list[str]:
    """Returns the command of one run."""
    keys = [f"--config.{key}={value}" for key, value in experiment.keys.items()]
    config = f"--config={experiment.specification(seed)}"
    flags = ["--keep_memory"] if keep_memory else []
    return ["python", "-m", "ieg_jax.main", config, *keys, f"--workdir={folder}", *flags]


def run(
    wanted: Iterable[Experiment],
    store: results.Store,
    seeds: int,
    jobs: int,
    dry_run: bool,
    console: Console,
    cluster: submit.Cluster | None = None,
    keep_memory: bool = False,
) -> None:
    """Runs every experiment with every seed, except for runs that are finished already or under way.

    A finished run of a work folder that is not kept yet, as one has that ran elsewhere, is kept.

    Args:
      wanted: the experiments, with the changes that the user asked for.
      store: where the runs are.
      seeds: how many seeds: 0, 1, ...
      jobs: how many runs there are at a time; the processors are divided among them. 0 = in this process, one after the
        other.
      dry_run: whether the commands are only printed.
      console: where to print what happens.
      cluster: where the runs are submitted to, and nothing waits for them; None = they take place here.
      keep_memory: whether the runs keep the temporary arrays of a step, as the flag of `ieg_jax.main` says.

    Raises:
      UserError: before anything is run, for a configuration or a key that is wrong, and for a finished run with other
        settings; at the end, where runs failed.
    """
    pending, stages, unkept = [], collections.Counter(), []
    wanted = list(wanted)
    # What waits in a queue may be run here: its job finds that all is done.
    left_out = ("done", "running") if cluster is None or cluster.resubmit else ("done", "running", "queued")
    for seed in range(seeds):
        for experiment in wanted:
            stage = store.stage(experiment, seed)
            stages[stage if stage in left_out else "to do"] += 1
            if stage not in left_out:
                pending.append((experiment, seed))
            elif store.is_to_be_kept(experiment, seed):
                unkept.append((experiment, seed))
    others = "".join(f", {stages[stage]} {stage}" for stage in left_out[1:] if stages[stage])
    comment = "# " if dry_run and cluster else ""  # above a script or manifests
    console.print(f"{comment}{stages.total()} runs, {stages['done']} finished already, {len(pending)} to do{others}")
    if stages["queued"]:
        console.print(f"{comment}where the jobs of what is queued are gone, --resubmit submits it again")
    if not dry_run:
        for experiment, seed in unkept:
            kept = store.keep(experiment, seed)
            console.print(f"kept: {_in_words(experiment, seed, kept)}", highlight=False, markup=False)
    cells = [_cell(experiment, seed, store, keep_memory) for experiment, seed in pending]
    if cluster:
        if cells:
            submit.submit(cluster, cells, dry_run, console)
    elif dry_run:
        for cell in cells:
            console.print(shlex.join(cell.command), soft_wrap=True, highlight=False)
    elif pending:
        if jobs:
            failed = _run_here(pending, [cell.command for cell in cells], store, jobs, console)
        else:
            failed = _run_in_process(pending, store, console, keep_memory)
        if failed:
            names = "; ".join(f"{name}, seed {seed}" for name, seed in sorted(failed))
            raise UserError(f"{len(failed)} of {len(pending)} runs failed: {names}")


def _cell(experiment: Experiment, seed: int, store: results.Store, keep_memory: bool) -> submit.Cell:
    folder = store.work_folder(experiment, seed)
    return submit.Cell(experiment.name, seed, command_line(experiment, seed, folder, keep_memory), folder)


def _in_words(experiment: Experiment, seed: int, finished: dict[str, Any]) -> str:
    accuracy, seconds = results.spread([finished]), finished["result"]["wall_seconds"]
    return f"{experiment.name}, seed {seed}: {accuracy} %, {seconds:.0f} s"


def _run_in_process(
    pending: Sequence[tuple[Experiment, int]], store: results.Store, console: Console, keep_memory: bool
) -> set[tuple[str, int]]:
    """Runs experiments, each with a seed, in this process, which loads libraries and data once.

    Returns those that failed.

    Several such commands may share the work folders: each leaves alone what another has finished or has under way.
    """
    # These import what only training needs.
    from ieg_jax.data.load import LoadOnce
    from ieg_jax.train.loop import train_and_evaluate

    load = LoadOnce()
    if keep_memory:
        allocation.prepare()
    watch.enable_compilation_cache(cli.COMPILATION_CACHE)
    failed = set()
    for number, (experiment, seed) in enumerate(pending, start=1):
        if store.stage(experiment, seed) in ("done", "running"):
            continue
        try:
            config = results.load_config(experiment, seed)
            train_and_evaluate(config, str(store.work_folder(experiment, seed)), quiet=True, load=load)
        except (UserError, NonFiniteError) as error:
            if store.stage(experiment, seed) == "running":
                continue  # another command took it at the same moment
            failed.add((experiment.name, seed))
            what = f"{experiment.name}, seed {seed}: failed\nerror: {error}"
        else:
            what = _in_words(experiment, seed, store.keep(experiment, seed))
        console.print(f"[{number}/{len(pending)}] {what}", highlight=False, markup=False)
        jax.clear_caches()  # the next run has other programs
        gc.collect()  # and needs the memory of this one; commands collect seldom by themselves
    return failed


def _run_here(
    pending: Sequence[tuple[Experiment, int]],
    commands: Sequence[Sequence[str]],
    store: results.Store,
    jobs: int,
    console: Console,
) -> set[tuple[str, int]]:
    """Runs experiments, each with a seed and a command, on this machine, several at a time; returns those that failed.

    A run that fails does not stop the others; the last lines that it printed are shown.
    """
    # SIGTERM is treated like Ctrl-C. If it only ended this process, the runs would go on without it.
    signal.signal(signal.SIGTERM, _interrupt)
    failed = set()
    processes = Processes(min(jobs, len(pending)))
    with concurrent.futures.ThreadPoolExecutor(processes.count) as pool:
        futures = {pool.submit(processes.run, command): run for command, run in zip(commands, pending, strict=True)}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                experiment, seed = futures[future]
                code, tail = future.result()
                if code:
                    failed.add((experiment.name, seed))
                    what = f"{experiment.name}, seed {seed}: failed\n{tail}"
                else:
                    what = _in_words(experiment, seed, store.keep(experiment, seed))
                console.print(f"[{number}/{len(pending)}] {what}", highlight=False, markup=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return failed


def _interrupt(*_) -> NoReturn:
    raise KeyboardInterrupt


class Processes:
    """Runs commands as processes, each on its share of the processors."""

    def __init__(self, count: int):
        """Divides the processors among `count` processes, which run at the same time."""
        self.count = count
        processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares = [set(processors[i::count]) for i in range(count)] if len(processors) >= count > 1 else []
        self._free = list(range(count))
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a command to its end. At most `count` threads may do so at a time.

        Returns:
          The exit status, and the last lines that the command printed; "" where `count` is 1, for then it prints to the
          terminal.
        """
        with self._lock:
            slot = self._free.pop()
        try:
            if self._shares:  # this sets the processors of this thread, and the new process inherits them
                os.sched_setaffinity(0, self._shares[slot])
            with tempfile.TemporaryFile("w+") as output:
                streams = {} if self.count == 1 else {"stdout": output, "stderr": output}
                process = subprocess.Popen([sys.executable, *command[1:]], **streams)
                with self._lock:
                    self._running.add(process)
                code = process.wait()
                output.seek(0)
                return code, "".join(output.readlines()[-15:])
        finally:
            with self._lock:
                self._free.append(slot)
                self._running.discard(process)

    def stop(self) -> None:
        """Sends SIGTERM to every process, upon which a run saves its state and ends."""
        with self._lock:
            for process in self._running:
                process.terminate()
