"""Hands runs to a cluster: one Slurm array with a task for each, or one JobSet for each, which Kueue admits.

The scripts of launch/ do the work on the cluster: `slurm.sbatch` trains in a task, `gke.sh` renders a manifest. Nothing
here waits for a job or asks a scheduler for it. How far a run is stands in its work folder, where a submission leaves
queued.json (see `runtime.claim`), which the start of the job removes.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console

from ieg_jax import files
from ieg_jax.errors import StorageError, UserError
from ieg_jax.runtime import claim

# The programs that submit -> why they may be missing.
PROGRAMS = {
    "slurm": ("sbatch", "run this on a login node of the cluster"),
    "jobset": ("kubectl", "install it, and give it the credentials of the cluster"),
}
# A flag -> the values of --on with which it is read.
READS = {
    "submissions": ("slurm", "jobset"),
    "resubmit": ("slurm", "jobset"),
    "gpus": ("slurm", "jobset"),
    "partition": ("slurm",),
    "time-limit": ("slurm",),
    "cpus": ("slurm",),
    "jobs": ("local", "slurm"),
    "image": ("jobset",),
    "queue": ("jobset",),
    "namespace": ("jobset",),
    "slice": ("jobset",),
    "service-account": ("jobset",),
}
TO_GKE = ("image", "queue", "namespace", "slice", "gpus", "service-account")  # flags of launch/gke.sh too


def define_flags() -> None:
    """Defines the flags that say where the runs take place."""
    flags.DEFINE_enum("on", "local", ["local", "slurm", "jobset"], "Run: on this machine, or a job of a cluster each.")
    flags.DEFINE_string("submissions", "runs/submissions", "slurm, jobset: parent of the folders of what is submitted.")
    flags.DEFINE_bool("resubmit", False, "slurm, jobset: submit what waits in a queue too; its jobs were cancelled.")
    flags.DEFINE_integer("gpus", 0, "slurm, jobset: GPUs of one node for each run.", lower_bound=0)
    flags.DEFINE_integer("cpus", 0, "slurm: processors for each GPU or, without, each run.", lower_bound=0)
    flags.DEFINE_string("partition", "", "slurm: where the jobs are queued; empty = the cluster's default.")
    flags.DEFINE_string("time-limit", "", "slurm: MINUTES, [DAYS-]HH:MM:SS; a run that needs more goes on after it.")
    flags.DEFINE_string("image", "", "jobset: the image of launch/Dockerfile, with EXTRA=tpu or gpu.")
    flags.DEFINE_string("queue", "", "jobset: the LocalQueue of Kueue, in the namespace.")
    flags.DEFINE_string("namespace", "default", "jobset: of Kubernetes.")
    flags.DEFINE_string("slice", "", "jobset: CHIP:TOPOLOGY of TPUs for each run, such as v5e:2x2; or --gpus.")
    flags.DEFINE_string("service-account", "", "jobset: of Kubernetes, that may write to the bucket.")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run that is to be submitted.

    Attributes:
      name: of its experiment.
      seed: of the run.
      command: its command line, `python -m ieg_jax.main --config=… …`.
      folder: its work folder.
    """

    name: str
    seed: int
    command: Sequence[str]
    folder: epath.Path


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where runs are submitted to, and how.

    Attributes:
      on: slurm or jobset.
      options: of the cluster, the values of flags by their names; empty ones are missing.
      submissions: parent of the folders in which the submissions leave what they hand over.
      resubmit: whether what waits in a queue is submitted too.
    """

    on: str
    options: Mapping[str, Any]
    submissions: pathlib.Path = pathlib.Path("runs/submissions")
    resubmit: bool = False


def cluster(values: flags.FlagValues) -> Cluster | None:
    """Reads and checks the flags; no run has been looked at yet.

    Args:
      values: the flags of `define_flags`, and `jobs`, `workdir` and `dry-run`.

    Returns:
      None where the runs take place on this machine.

    Raises:
      UserError: for a flag that is not read with this --on, and for a value that launch/ or the cluster would refuse;
        where launch/ is not there; and, unless dry-run is set, where the program that submits is missing.
    """
    on = values.on
    for name, places in READS.items():
        if values[name].present and on not in places:
            raise UserError(f"--{name}: got --on={on}; it is read with {' or '.join(f'--on={p}' for p in places)} only")
    if on == "local":
        return None
    if not pathlib.Path("launch/slurm.sbatch").is_file():
        raise UserError(f"--on={on}: got no launch/slurm.sbatch in {pathlib.Path.cwd()}; run this from the root of the "
                        f"checkout")  # fmt: skip
    if not re.fullmatch(r"[\w./+,=-]+", values.submissions):
        raise UserError(f"--submissions={values.submissions}: expected a folder of this machine without spaces and %")
    names = (name for name, places in READS.items() if on in places and name not in ("submissions", "resubmit", "jobs"))
    options = {name: values[name].value for name in names if values[name].value}
    if on == "slurm":
        if not values.jobs:
            raise UserError("--jobs=0: it is read with --on=local only; expected how many jobs Slurm runs at a time")
        if values["jobs"].present:
            options["jobs"] = values.jobs
        _check_slurm(options)
    else:
        if not values.queue:
            raise UserError("got no --queue; expected the name of a LocalQueue of Kueue in the namespace")
        _manifest("check", ["--config=configs/default.py", f"--workdir={values.workdir}"], options)
    program, hint = PROGRAMS[on]
    if not values["dry-run"].value and shutil.which(program) is None:
        raise UserError(f"got no program {program!r} on PATH; {hint}, or see with --dry-run what would be submitted")
    return Cluster(on, options, pathlib.Path(values.submissions), values.resubmit)


def submit(cluster: Cluster, cells: Sequence[Cell], dry_run: bool, console: Console) -> None:
    """Submits runs.

    What is handed over is kept in a new folder below `cluster.submissions`, and each work folder gets a queued.json.

    Args:
      cluster: where to.
      cells: the runs, at least one.
      dry_run: the scripts or manifests are printed, and nothing is written or submitted.
      console: where to print.

    Raises:
      UserError: for a command that cannot be handed over, before anything is written; and where the cluster refuses,
        with what it said.
      StorageError: where a work folder cannot be written.
    """
    folder = _new_folder(cluster.submissions)
    texts = _array(cells, folder, cluster.options) if cluster.on == "slurm" else _manifests(cells, folder, cluster)
    if dry_run:
        for name, text in texts.items():
            console.out(f"# {folder / name}\n{text}", highlight=False, end="")
        return
    try:
        folder.mkdir(parents=True)
        for name, text in texts.items():
            files.write(folder / name, text)
    except OSError as error:
        raise UserError(f"--submissions={cluster.submissions} cannot be written: {error}") from None
    script = str(folder / next(iter(texts)))
    program, _ = PROGRAMS[cluster.on]
    options = [] if cluster.on == "slurm" else [f"--namespace={cluster.options['namespace']}", "apply", "--filename"]
    said = ""
    try:
        # Before the jobs can start: a start removes the file.
        for cell in cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(cell.folder / claim.QUEUED, {"on": cluster.on, "submission": str(folder)})
        done = subprocess.run([program, *options, script], capture_output=True, text=True, check=False)
        said = done.stdout
        if done.returncode:
            raise UserError(f"{program} refused {script} (exit code {done.returncode}): {done.stderr.strip()}")
    except BaseException:
        for cell in cells:
            if f"/{jobset_name(cell, folder)} " not in said:  # kubectl names those that it has taken
                with contextlib.suppress(*files.storage_errors(), StorageError):
                    (cell.folder / claim.QUEUED).unlink(missing_ok=True)
        raise
    console.print(f"{len(cells)} runs submitted, see {folder}", highlight=False, markup=False)
    console.out(said.strip(), highlight=False)


def _new_folder(parent: pathlib.Path) -> pathlib.Path:
    """Returns the path of a folder that does not exist, named by the time."""
    name = time.strftime("%Y%m%d-%H%M%S")
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder


# ---- Slurm ----


def _check_slurm(options: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[\w.,-]*", options.get("partition", "")):
        raise UserError(f"--partition={options['partition']}: expected the name of a partition")
    if not re.fullmatch(r"(\d+|\d+:\d\d:\d\d|\d+-\d\d?(:\d\d){0,2})?", options.get("time-limit", "")):
        raise UserError(f"--time-limit={options['time-limit']}: expected MINUTES, HH:MM:SS or DAYS-HH:MM:SS")


def _array(cells: Sequence[Cell], folder: pathlib.Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns the script of an array and the file of its runs, by their names."""
    # What slurm.sbatch asks Slurm for, such as to be told before the time limit; Slurm reads this of the script itself.
    asked = re.findall(r"^#SBATCH (?!--output).*$", pathlib.Path("launch/slurm.sbatch").read_text(), flags=re.MULTILINE)
    at_once, gpus = options.get("jobs"), options.get("gpus", 0)
    wanted = {
        "array": f"0-{len(cells) - 1}{f'%{at_once}' if at_once else ''}",
        "output": folder / "task-%a.out",
        "nodes": 1,
        "ntasks-per-node": gpus or 1,
        "gpus-per-node": gpus,
        "cpus-per-task": options.get("cpus"),
        "partition": options.get("partition"),
        "time": options.get("time-limit"),
    }
    script = [
        "#!/usr/bin/env bash",
        f"# {len(cells)} runs, a task each: line 1 of {folder / 'cells.txt'} has the flags of task 0, and so on.",
        *asked,
        *(f"#SBATCH --{name}={value}" for name, value in wanted.items() if value),
        "set -euo pipefail",
        f"cd {shlex.quote(str(pathlib.Path.cwd()))}",
        f"export PYTHON={shlex.quote(sys.executable)}",
        f'flags=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {folder / "cells.txt"})',
        'eval "exec launch/slurm.sbatch -- $flags"',
    ]
    lines = [shlex.join(cell.command[3:]) for cell in cells]
    for line in lines:
        if "\n" in line:
            raise UserError(f"got a flag with a line break, which a file of runs cannot hold: {line}")
    return {"array.sbatch": "\n".join(script) + "\n", "cells.txt": "\n".join(lines) + "\n"}


# ---- JobSet ----


def jobset_name(cell: Cell, folder: pathlib.Path) -> str:
    """Returns the name of the JobSet of a run, at most 40 characters; each submission has its own.

    Args:
      cell: the run.
      folder: of the submission.
    """
    digest = hashlib.sha256(shlex.join([folder.name, *cell.command]).encode()).hexdigest()[:8]
    end = f"-{cell.seed}-{digest}"
    words = re.sub(r"[^a-z0-9]+", "-", f"ieg-{cell.name.lower()}")
    return words[: 40 - len(end)].rstrip("-") + end


def _manifests(cells: Sequence[Cell], folder: pathlib.Path, cluster: Cluster) -> dict[str, str]:
    """Returns the file of the manifests by its name."""
    parts = [_manifest(jobset_name(cell, folder), cell.command[3:], cluster.options) for cell in cells]
    return {"jobsets.yaml": "---\n".join(parts)}


def _manifest(name: str, training: Sequence[str], options: Mapping[str, Any]) -> str:
    """Returns the manifest of one JobSet, as launch/gke.sh renders it.

    Args:
      name: of the JobSet.
      training: the flags of `python -m ieg_jax.main`.
      options: the flags of the script, see TO_GKE.

    Raises:
      UserError: with the script's own words, where it refuses a flag.
    """
    given = [f"--{key}={options[key]}" for key in TO_GKE if key in options]
    command = ["launch/gke.sh", "render", f"--name={name}", *given, "--", *training]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    return done.stdout
