"""The beginning of a run: what stays the same while it goes on, and the state from which it goes on."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import hardware
from ieg_jax.data.batches import EvalBatches, train_batches
from ieg_jax.data.load import Data, Load, load_data
from ieg_jax.data.splits import UNKNOWN
from ieg_jax.errors import UserError, check_choice
from ieg_jax.lazy import metric_writers
from ieg_jax.models import onednn, pretrained
from ieg_jax.runtime import mesh, processes
from ieg_jax.runtime.checkpoints import Checkpoints
from ieg_jax.runtime.progress import Reporter
from ieg_jax.runtime.workdir import WorkFolder, class_name
from ieg_jax.train import dashboard, durations, evaluation, look, metrics, program, tracking
from ieg_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same while a run goes on."""

    config: ConfigDict  # resolved
    folder: WorkFolder
    data: Data
    steps: durations.Durations
    shardings: mesh.Shardings
    program: program.Program
    evaluations: dict[str, EvalBatches]
    image_shape: tuple[int, int, int]  # of an image whose class is predicted
    rng: jax.Array  # of the initial weights
    step_rng: jax.Array  # of the steps

    def seen_after(self, state: TrainState, step: int) -> look.Look:
        """A look at the training set after a step, counted from 1."""
        epoch, is_last = self.steps.epoch(step), step == self.steps.num_steps
        return look.at(self.config, self.data.train, self.shardings, self.program, state, epoch, is_last)


@dataclasses.dataclass
class Progress:
    """What changes while a run goes on."""

    start: int  # the step at which it was when it was started this time
    state: TrainState
    window: metrics.Window
    rows: list[dict[str, Any]]  # of metrics.jsonl
    began: float  # time.monotonic() of this start
    seconds_before: float  # of earlier starts
    writer: metric_writers.MetricWriter
    compile_seconds: float = 0.0
    training_seconds: float = 0.0  # in steps, evaluation left out

    @property
    def wall_seconds(self) -> float:
        """Of all starts together."""
        return self.seconds_before + time.monotonic() - self.began

    def images_per_second(self, step: int, batch_size: int) -> float:
        """Of this start, up to a step."""
        return (step - self.start) * batch_size / max(self.training_seconds, 1e-9)


def prepare(
    config: ConfigDict,
    folder: WorkFolder,
    shardings: mesh.Shardings,
    network: nn.Module | None,
    quiet: bool = False,
    load: Load = load_data,
) -> Run:
    """Loads the data, resolves what follows from them, and builds the program."""
    with processes.together():
        data = load(config, quiet)
        config = config_lib.resolve(config, data.facts)
        steps = durations.in_steps(config, len(data.train))
        named = {data.evaluation_name: data.evaluation, "trusted": data.trusted}
        evaluations = {
            name: EvalBatches(config, split, shardings.batch) for name, split in named.items() if split is not None
        }
        shape = program.data_shape(config, data)
    processes.check_same("the data", json.dumps(data.fingerprint()))
    built = program.build(config, shardings, shape, steps, network)
    _check_best_metric(config, built, evaluations)
    # jax takes the lowest 32 bits of a seed.
    seed = jax.device_put(np.uint32(config.seed % 2**32), shardings.replicated)
    rngs = _split_key(shardings.replicated)(seed)
    return Run(config, folder, data, steps, shardings, built, evaluations, shape.evaluation_image, *rngs)


@functools.lru_cache(maxsize=4)
def _split_key(place: jax.sharding.Sharding) -> Callable[[np.uint32], tuple[jax.Array, jax.Array]]:
    """Seed -> two keys."""
    return jax.jit(lambda seed: tuple(jax.random.split(jax.random.key(seed))), out_shardings=place)


def write_down(run: Run, network: nn.Module | None) -> None:
    """Claims the work folder and writes down what the run is made of."""
    folder, data = run.folder, run.data
    # Before config.json, with which the run has begun.
    with processes.together():
        folder.check_data(data.fingerprint())
    made = None if data.features is None else data.features.to_json()
    folder.write_network(None if network is None else class_name(network), run.image_shape, made)
    with processes.together():
        folder.begin(run.config, data.fingerprint())
    folder.write("noise.json", data.noise_report)
    folder.write("trusted.json", data.trusted_report)
    folder.write("classes.json", list(data.class_names))
    if run.config.noise.kind != "none":
        folder.write("noisy_labels.json", data.noisy_labels.tolist())
    if data.left_out:
        folder.write("left_out.json", data.left_out)


def start(
    run: Run, checkpoints: Checkpoints, weights: pretrained.Weights, reporter: Reporter, began: float
) -> Progress:
    """The state at step 0, or that of the newest checkpoint that is not damaged."""
    saved = checkpoints.restore_newest((run.program.state, run.program.window), reporter.warn)
    if saved:
        start, (state, window), position = saved
        if position != start * run.config.batch_size:
            raise UserError(f"checkpoint {start} stopped at example {position}, not {start} batches")
        reporter.say(f"goes on from the checkpoint at step {start}")
    else:
        start, state = 0, run.program.init(run.rng, pretrained=weights.arrays)
        window = run.program.empty_window()
        if weights.note:
            reporter.say(weights.note)
    rows = json.loads(processes.from_first(json.dumps(run.folder.rewind(start))))
    checkpoints.note_metrics(rows)
    seconds_before = rows[-1].get("speed/wall_seconds", 0.0) if rows else 0.0
    writer = metric_writers.create_default_writer(str(run.folder.path), just_logging=jax.process_index() != 0)
    with processes.together():
        tracker = tracking.start(run.config, run.folder, start > 0, reporter)
    if tracker is not None:
        writer = metric_writers.MultiWriter([writer, tracker])
    if not start:
        truth = bool((run.data.train.clean_labels != UNKNOWN).any())
        dashboard.begin(writer, run.config, run.program.window.averages, run.data.evaluation_name, truth)
    return Progress(start, state, window, rows, began, seconds_before, writer)


def notices(run: Run) -> list[str]:
    """What of the data looks like a mistake, and which keys would make the run faster on these devices; for people."""
    config, count, kind = run.config, run.shardings.num_devices, run.shardings.mesh.devices.flat[0].device_kind
    said = list(run.data.notices)
    parts = count * config.microbatches
    if count > 1 and config.batch_groups % parts:
        said.append(
            f"batch_groups={config.batch_groups} on {count} devices: batch norm, and mixup with its images, go across "
            f"them at every step; batch_groups={parts} keeps these where they are, inside groups"
        )
    if hardware.chip(kind) and config.model.dtype == "float32" and run.image_shape[:2] != (1, 1):  # not of features
        said.append(f"model.dtype=float32 on {kind}: bfloat16 is faster there and takes less memory, and rounds more")
    convolutions = sum(leaf.ndim >= 4 for leaf in jax.tree.leaves(run.program.state.params))
    wanted = config.model.convolutions != "lax" and config.model.dtype == "float32" and onednn.PACKAGED
    if kind == "cpu" and convolutions > 1 and wanted:
        if reason := onednn.missing():
            said.append(f"convolutions by XLA; a step takes up to three times as long as with oneDNN: {reason}")
        elif count > 1:
            said.append(f"convolutions by XLA on {count} devices of a processor; oneDNN, which is faster, needs one")
    return said


def noise_in_words(config: ConfigDict, report: dict[str, Any]) -> str:
    """The share of the labels that was to be wrong or, of labels in a file, that is wrong; and the kind of noise."""
    if config.noise.kind == "none":
        return ""
    rate = report["rate_effective"] if report["rate"] is None else report["rate"]
    share = "" if rate is None else f"{rate:.0%} "
    return f", {share}{config.noise.kind} noise" + (f" ({config.noise.label_set})" if config.noise.label_set else "")


def _check_best_metric(config: ConfigDict, run: program.Program, evaluations: Iterable[str]) -> None:
    kinds = [f"{metric}{suffix}" for metric in evaluation.METRICS for suffix in ("", "_raw")]
    known = [f"{name}/{kind}" for name in evaluations for kind in kinds] + sorted(run.window.averages)
    if config.checkpoint.keep_best:
        check_choice("checkpoint.best_metric", config.checkpoint.best_metric, known)


def batches(run: Run, state: TrainState, step: int) -> Iterator[dict[str, jax.Array]]:
    """The batches after a step, of the rows that the method has chosen."""
    return train_batches(
        run.config, run.data, run.program.method.streams, step, run.steps.num_steps, run.shardings.batch,
        look.chosen_rows(state), run.steps.epoch_start(step),
    )  # fmt: skip
