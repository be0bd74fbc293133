"""What is measured in processes of its own: start-up, simulated devices, millions of examples."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.bench import measure
from benchmarks.bench.options import Options
from benchmarks.bench.steps import Rows

ROOT = pathlib.Path(__file__).resolve().parents[2]
PHASES = ("import", "build", "compile", "first step")
DEVICES = (1, 2, 4, 8)
EXAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)

START = """
import json, sys, time
began = time.perf_counter()
import jax
from benchmarks.bench import programs
from ieg_jax.runtime import watch
times = [time.perf_counter()]
method, network, cache = sys.argv[1:]
watch.enable_compilation_cache(cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
network = programs.NETWORKS[network]
run = programs.build(programs.config_of(method, network, {}), network.size)
lowered = run.lowered_step
times.append(time.perf_counter())
compiled = run.compiled_step()
times.append(time.perf_counter())
state, batch = run.init(jax.random.key(0)), programs.random_batch(run, programs.CLASSES, programs.EXAMPLES)
jax.block_until_ready(compiled(state, run.empty_window(), batch, jax.random.key(1)))
times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip([began, *times], times)]))
"""

SPLIT = """
import json, sys
from benchmarks.bench import measure, programs
found = {}
network = programs.NETWORKS["tiny"]
steps = {}
for devices in json.loads(sys.argv[2]):
    keys = {"batch_size": 64, "trusted__batch_size": 64, "batch_groups": 8, "mesh__data": devices}
    steps[devices] = programs.step_of("ieg", network, {}, **keys)
    steps[devices].begin()
taken = measure.interleaved({devices: step.sample for devices, step in steps.items()}, int(sys.argv[1]))
print(json.dumps({devices: [taken[devices], step.facts] for devices, step in steps.items()}))
"""


def output_of(arguments: list[str], **environment: str) -> str:
    """What a Python process prints; raises RuntimeError with the end of its errors where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[:3]}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def measure_startup(options: Options) -> tuple[Rows, list[str]]:
    """Rows `startup/<method>, <network>/<phase>`, cold and with a filled cache of compiled programs.

    `import` loads jax, TensorFlow and the project, `build` makes the program and traces it, `compile` is XLA, and
    `first step` draws the weights and takes one step; `whole` is the life of the process.
    """
    cases = [("supervised", "tiny")] if options.quick else [("supervised", "WRN-10-1"), ("ieg", "WRN-10-1")]
    rows = {}
    for method, network in cases:
        where = f"startup/{method}, {network}"
        for number in range(1 if options.quick else min(options.rounds, 2)):
            options.say(f"{where}: start {number + 1}")
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "cached"):
                    took = []
                    sample = measure.sample(lambda cache=cache, took=took: took.extend(start(method, network, cache)))  # noqa: B023
                    values = dict(zip(PHASES, took, strict=True)) | {"whole": sample["seconds"]}
                    for phase, seconds in values.items():
                        row = rows.setdefault(f"{where}/{kind}: {phase}", {"unit": "s", "samples": [], "others": []})
                        row["samples"].append(seconds)
                        row["others"].append(sample["others"])
                        if kind == "cached":
                            row["base"] = f"{where}/cold: {phase}"
    return rows, []


def start(method: str, network: str, cache: str) -> list[float]:
    """Seconds of each of PHASES in a new process."""
    return json.loads(output_of(["-c", START, method, network, cache]).splitlines()[-1])


def measure_devices(options: Options) -> Rows:
    """Rows `growth/devices/<n>`: IEG on a tiny network, a batch of 64 over n simulated devices that share the cores."""
    options.say(f"growth: {', '.join(map(str, DEVICES))} simulated devices")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
    printed = output_of(["-c", SPLIT, str(options.few), json.dumps(DEVICES)], XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {
        f"growth/devices/{number}": measure.row(taken, base="growth/devices/1", **facts)
        for number, (taken, facts) in found.items()
    }


def measure_examples(options: Options) -> Rows:
    """Rows `growth/<what>/N = <N>`: loading, batches, a checkpoint and, up to a million, an audit of N examples."""
    rows = {}
    for n in EXAMPLES[:1] if options.quick else EXAMPLES:
        kinds = "load,batch" if options.quick else "load,batch,checkpoint" + ",audit" * (n <= 1_000_000)
        options.say(f"growth: {n:,} examples")
        before, mine, began = measure.busy(), measure.own(), time.perf_counter()
        printed = output_of(["-m", "benchmarks.scale", f"--n={n}", f"--rows={kinds}"], JAX_PLATFORMS="cpu")
        spent, mine, others = time.perf_counter() - began, measure.own() - mine, None
        if before is not None:
            others = max(0.0, (measure.busy() - before - mine) / spent)
        for what, seconds, peak in scale_rows(printed):
            rows[f"growth/{what}/N = {n:,}"] = {
                "unit": "s", "samples": [seconds], "others": [others], "mib": peak, "base": f"growth/{what}/N = 10,000",
            }  # fmt: skip
    return dict(sorted(rows.items(), key=lambda item: list(rows).index(item[0].rpartition("/")[0] + "/N = 10,000")))


def scale_rows(printed: str) -> list[tuple[str, float, float]]:
    """What benchmarks.scale printed: what, seconds, peak memory in MiB; parts of the audit are added up."""
    found: dict[str, tuple[float, float]] = {}
    for line in printed.splitlines():
        columns = [column.strip() for column in line.strip("| ").split("|")]
        if len(columns) != 5 or columns[0] in ("what", "---"):
            continue
        what = "audit" if columns[0].startswith("audit") else columns[0].split(", ")[0].split(" of ")[0].strip("… ")
        seconds, peak = float(columns[1]), float(columns[4].replace(",", ""))
        before = found.get(what, (0.0, 0.0))
        found[what] = (before[0] + seconds, max(before[1], peak))
    return [(what, *values) for what, values in found.items()]
