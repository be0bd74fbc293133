"""Runs as a whole, in processes of their own: starting them, and comparing what they leave behind."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from compilation import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parents[1]
TIMINGS = ("speed/", "time/")
CACHE = ROOT / ".cache" / "xla"


def rows(folder):
    """The rows of metrics.jsonl without what depends on the time of day."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(line.startswith('{"step": ') for line in lines), "step is the first key"
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]


def variables(folder, step):
    """Every array of a checkpoint, by path; whatever devices it was written on."""
    handlers = {"tree": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder / "checkpoints", item_handlers=handlers) as manager:
        saved = manager.item_metadata(step)["tree"].tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        restore = ocp.args.Composite(tree=ocp.args.PyTreeRestore(restore_args=as_numpy))
        tree = manager.restore(step, args=restore)["tree"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def checkpoint_steps(folder):
    """Steps of the complete checkpoints, in order."""
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_run(first, second, step):
    """Bit for bit."""
    assert rows(first) == rows(second)
    one, two = variables(first, step), variables(second, step)
    assert one.keys() == two.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(arguments, processes=1, devices=1, environment=None, log=None):
    """Starts `python arguments...` as one or several processes with simulated devices.

    Args:
      arguments: of the interpreter; with several processes the flags that join them are added.
      processes: how many.
      devices: of each.
      environment: variables besides those of this process.
      log: folder for what they print, in <process>.txt; None = nowhere.
    """
    port, started = free_port(), []
    for process in range(processes):
        joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={process}"]
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, *map(str, arguments), *(joined if processes > 1 else [])]
        environ = {**os.environ, **settings, **(environment or {})}
        with open(log / f"{process}.txt" if log else os.devnull, "a") as output:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output))
    return started


SMALL = {
    "model.name": "tiny",
    "batch_size": 16,
    "eval_batch_size": 100,
    "num_train_epochs": 0.0,
    "checkpoint_every_epochs": 0.0,
    "eval_every_epochs": 0.0,
    "schedule.first_cycle_epochs": 0.0,
    "schedule.first_cycle_steps": 100,
}  # keys that make a run small; durations are to be added in steps


def main_arguments(config, workdir, keys):
    """Arguments of the interpreter for a run through the command, with `keys` of the configuration set."""
    flags = [f"--config={config}", f"--workdir={workdir}", f"--compilation_cache={CACHE}"]
    return ["-m", "ieg_jax.main", *flags, *[f"--config.{key}={value}" for key, value in keys.items()]]
