"""Training, from a configuration to result.json. Reads from top to bottom.

A run can start in four ways, decided by what is in the work folder:

1. nothing: it starts at step 0;
2. a run with the same configuration that was interrupted: it goes on from the newest checkpoint that is not damaged,
   and everything it computes and logs is what it would have been without the interruption;
3. a finished run with the same configuration: it is reported, nothing is trained;
4. a run with another configuration: an error that names the differing keys.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
from clu import asynclib, metric_writers  # writes TensorBoard files and the log
from ml_collections import ConfigDict

from ieg_jax import (
    checkpointing,
    dashboard,
    distributed,
    inference,
    memory,
    metrics,
    observability,
    program,
    schedules,
    sharding,
    steps,
)
from ieg_jax import config as config_lib
from ieg_jax.data import pipeline
from ieg_jax.data.splits import UNKNOWN
from ieg_jax.errors import NonFiniteError, StorageError, UserError, check_choice, first_line
from ieg_jax.models import pretrained
from ieg_jax.progress import Reporter
from ieg_jax.workdir import WorkFolder, provenance


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""


def train_and_evaluate(
    config: ConfigDict, workdir: str, network: nn.Module | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Trains what `config` says in the work folder `workdir`.

    Where several processes run together, each calls this with the same arguments (`distributed.initialize` first).

    Args:
      config: see configs/default.py. Not changed.
      workdir: folder for checkpoints, metrics and the result; local or on a bucket.
      network: any linen module that fits `program.adapt`, in place of the one that `config.model` names. The work
        folder notes its class in network.json; `inference.load` then wants it too.
      quiet: nothing is shown while it trains.

    Returns:
      The contents of result.json.

    Raises:
      UserError: for a configuration, data or work folder that cannot be used; before anything is compiled.
      NonFiniteError: where a metric becomes nan or infinite.
      StorageError: where the work folder can no longer be written; what it held before is intact.
      Interrupted: after SIGTERM or SIGINT to any process, when the state has been saved.
    """
    # ---- What is to be done, and has it been done?
    with distributed.together():
        config = _resolve(config)
        config_lib.validate(config)
        layout = sharding.create(config)
    folder = WorkFolder(workdir, writes=jax.process_index() == 0)
    distributed.check_same("the configuration", config.to_json())
    distributed.check_shared(folder.path, "--workdir")
    with distributed.together():
        finished = folder.check(config)
        inference.check_network(folder.path, network)
        begins = not checkpointing.exist(folder.path / "checkpoints")
        file = pretrained.read(config.model) if begins else None
    finished = json.loads(distributed.from_first(json.dumps(finished)))
    if finished is not None:
        return finished

    # ---- Data, and the functions that are compiled for them.
    with distributed.together():
        data = pipeline.load(config)
        plan = make_plan(config, data)
        evaluations = {
            name: pipeline.EvalBatches(config, split, layout.batch)
            for name, split in ((data.evaluation_name, data.evaluation), ("trusted", data.trusted))
            if split is not None
        }
        shape = data_shape(config, data)
    fingerprint = data.fingerprint()
    distributed.check_same("the data", json.dumps(fingerprint))
    run = program.build(config, layout, shape, plan.first_cycle, plan.num_steps, plan.log_every, network)
    _check_best_metric(config, run, evaluations)
    with distributed.together():
        weights = pretrained.fit(file, config.model, run.state)
    distributed.check_same("the file of model.pretrained", file.sha256 if file else "")
    init_rng, step_rng = jax.jit(
        lambda: tuple(jax.random.split(jax.random.key(config.seed))), out_shardings=layout.replicated
    )()
    if network is not None:  # before config.json, with which the run has begun
        folder.write(inference.NETWORK, {"class": inference.class_name(network), "image_shape": shape.evaluation_image})
    with distributed.together():
        folder.begin(config, fingerprint)
    folder.write("noise.json", data.noise_report)
    folder.write("trusted.json", data.trusted_report)
    folder.write("classes.json", list(data.class_names))
    if config.noise.kind != "none":
        folder.write("noisy_labels.json", data.noisy_labels.tolist())
    if data.left_out:
        folder.write("left_out.json", data.left_out)

    # ---- Where it starts.
    began = time.monotonic()
    noise = "" if config.noise.kind == "none" else f", {config.noise.rate:.0%} {config.noise.kind} noise"
    title = f"{config.method.name} on {data.name}{noise}"
    reporter = Reporter(title, plan.num_steps, visible=jax.process_index() == 0 and not quiet)
    checkpoints = checkpointing.Checkpoints(folder.path / "checkpoints", config.checkpoint)
    saved = checkpoints.restore_newest((run.state, run.window), reporter.warn)
    if saved:
        start, (state, window), position = saved
        if position != start * config.batch_size:
            raise UserError(f"checkpoint {start} stopped at example {position}, not {start} batches")
        reporter.say(f"goes on from the checkpoint at step {start}")
    else:
        start, state, window = 0, run.init(init_rng, pretrained=weights.arrays), run.empty_window()
        if weights.note:
            reporter.say(weights.note)
    rows = json.loads(distributed.from_first(json.dumps(folder.rewind(start))))
    checkpoints.note_metrics(rows)
    seconds_before = rows[-1].get("speed/wall_seconds", 0.0) if rows else 0.0
    writer = metric_writers.create_default_writer(workdir, just_logging=jax.process_index() != 0)
    if not start:
        truth = bool((data.train.clean_labels != UNKNOWN).any())
        dashboard.begin(writer, config, run.window.averages, data.evaluation_name, truth)

    # ---- The loop.
    with contextlib.ExitStack() as stack:
        stack.enter_context(_storage_errors(checkpoints))
        stack.push(_closing(checkpoints))
        stack.push(_closing(writer))
        stack.enter_context(reporter)
        stop = stack.enter_context(distributed.StopRequest())
        compiling_began = time.monotonic()
        train_step = run.train_step.lower(state, window, run.batch, step_rng).compile()
        compile_seconds = time.monotonic() - compiling_began
        reporter.compiled(compile_seconds, start)
        # Of one device. XLA counts what is in a loop once, so that parts of a batch would be missing.
        flops = (train_step.cost_analysis() or {}).get("flops", 0.0) if config.microbatches == 1 else 0.0
        watchdog = stack.enter_context(observability.Watchdog(folder.path, config.stall_minutes))
        profiler = observability.Profiler(folder.path, config.profile.start_step, config.profile.num_steps)
        stack.callback(profiler.close)

        clock = observability.Clock("data", "compute", "metrics", "evaluation", "checkpoint")
        last_log, loop_seconds = start, 0.0
        batches = pipeline.train_batches(config, data, start, plan.num_steps, layout.batch)
        for step, batch in enumerate(clock.waiting("data", batches), start=start + 1):
            profiler.before(step)
            with clock("compute"):
                state, window = train_step(state, window, batch, step_rng)
                traced = profiler.after(step, state)
            reporter.step(step)
            if traced:
                reporter.say(f"a profile of the steps up to {step} is in {folder.path / 'plugins' / 'profile'}")
            row: dict[str, Any] = {}
            stopping = stop.requested(step)
            saving = stopping or step % plan.checkpoint_every == 0 or step == plan.num_steps
            logging = step % plan.log_every == 0 or step == plan.num_steps
            if logging or saving:
                with clock("compute"):
                    host_window = jax.device_get(window)
                _check_finite(host_window, checkpoints)
            if logging:
                with clock("metrics"):
                    row |= metrics.summarize(host_window)
                    if host_window.examples is not None:
                        omega = metrics.window_examples(host_window).weights
                        writer.write_histograms(step, {"weight/relative": omega * config.batch_size})
                        if step in plan.picture_steps and jax.process_index() == 0:
                            count = config.audit.suspects
                            pictures = dashboard.suspects(host_window, data.train, data.class_names, count)
                            writer.write_images(step, pictures)
                    window = run.empty_window()
                    profiler.asked(step)
            if step in plan.eval_steps:
                with clock("evaluation"):
                    row |= evaluate(state, evaluations, run.eval_step, watchdog.alive)
            if logging:
                seconds, parts = clock.lap()
                training = seconds - parts["evaluation"]
                loop_seconds += training
                row |= _speed(config, flops, step - last_log, training, parts)
                last_log = step
            if row:
                with clock("metrics"):
                    row["speed/wall_seconds"] = seconds_before + time.monotonic() - began
                    row["speed/eta_seconds"] = reporter.eta(step).total_seconds()
                    rows.append({"step": step, **row})
                    folder.append(rows[-1])
                    writer.write_scalars(step, row)
                    reporter.metrics(step, _headline(row, data.evaluation_name))
                    checkpoints.note_metrics(rows[-1:])
            if _ends_epoch(step, config.batch_size, len(data.train)) and run.method.on_epoch_end:
                state = run.method.on_epoch_end(state)
            if saving:
                # After the row: whatever a checkpoint covers has been written down, a kill in between only
                # makes the run compute it again.
                with clock("checkpoint"):
                    checkpoints.save(step, (state, window), step * config.batch_size)
            if stopping and step < plan.num_steps:
                checkpoints.wait()
                raise Interrupted(f"stopped at step {step} of {plan.num_steps}, saved in {checkpoints.folder}")
            watchdog.alive()
        checkpoints.wait()

    # ---- The result.
    if state.memory is not None:
        folder.write_arrays("examples.npz", memory.averages(jax.device_get(state.memory)))
    result = {
        "dataset": data.name,
        "noise": config.noise.kind,
        "noise_rate": config.noise.rate,
        "noise_rate_effective": data.noise_report["rate_effective"],
        "trusted_per_class": min(data.trusted_report["per_class"]),
        "method": config.method.name,
        "model": config.model.name if network is None else inference.class_name(network),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
        "seed": config.seed,
        "steps": plan.num_steps,
        **_accuracies(rows, data.evaluation_name),
        "wall_seconds": seconds_before + time.monotonic() - began,
        "compile_seconds": compile_seconds,
        "images_per_second": (plan.num_steps - start) * config.batch_size / max(loop_seconds, 1e-9),  # of this start
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": layout.num_devices,
        **provenance(),
    }
    folder.write("result.json", result)
    reporter.say(f"done, result in {folder.path / 'result.json'}")
    return result


@dataclasses.dataclass(frozen=True)
class Plan:
    """The durations of a run, in steps."""

    num_steps: int
    log_every: int
    checkpoint_every: int
    first_cycle: int
    cycle_ends: frozenset[int]  # of the learning rate; empty unless it restarts
    eval_steps: frozenset[int]
    picture_steps: frozenset[int]  # the first logged ones from each regular evaluation on


def make_plan(config: ConfigDict, data: pipeline.Data) -> Plan:
    """Turns the durations of the configuration into steps; one epoch is N / batch_size steps."""
    steps_per_epoch = len(data.train) / config.batch_size
    in_steps = {name: config_lib.duration(config, name, steps_per_epoch) for name in config_lib.DURATIONS}
    num_steps, first_cycle = in_steps["num_train"], in_steps["schedule.first_cycle"]
    log_every = in_steps["log_every"]
    ends = set()
    if config.schedule.name == "sgdr":
        cycle_ends = schedules.cycle_ends(first_cycle, config.schedule.cycle_mult, num_steps)
        ends = {end for end in cycle_ends if end <= num_steps}
    regular = set(range(in_steps["eval_every"], num_steps + 1, in_steps["eval_every"]))
    return Plan(
        num_steps=num_steps,
        log_every=log_every,
        checkpoint_every=in_steps["checkpoint_every"],
        first_cycle=first_cycle,
        cycle_ends=frozenset(ends),
        eval_steps=frozenset(regular | ends | {num_steps}),
        picture_steps=frozenset(min(-(-step // log_every) * log_every, num_steps) for step in regular | {num_steps}),
    )


def data_shape(config: ConfigDict, data: pipeline.Data) -> program.DataShape:
    """The shapes of the data, as augmentation makes them; raises UserError where they differ from image to image."""
    size = pipeline.split_image_size
    evaluated = data.trusted if data.evaluation is None else data.evaluation
    return program.DataShape(
        image=pipeline.image_shape(config, "standard", size(data.train)),
        evaluation_image=pipeline.image_shape(config, "evaluation", size(evaluated)),
        num_classes=data.num_classes,
        num_examples=len(data.train),
        num_ids=int(data.train.ids.max()) + 1,
    )


def evaluate(
    state: steps.TrainState,
    evaluations: dict[str, Iterable[dict[str, jax.Array]]],
    eval_step: Callable[..., dict[str, metrics.WeightedAverage]],
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the averaged and of the raw weights.

    Args:
      state: of the training.
      evaluations: name -> batches as of `pipeline.EvalBatches`.
      eval_step: `steps.eval_step`, compiled.
      alive: called after each batch.

    Returns:
      E.g. `test/accuracy` (averaged weights), `test/accuracy_raw`, `test/top5_accuracy`, `trusted/accuracy`. Each
      example counts exactly once. Without an average of the weights both are the raw ones.
    """
    weights = {"": state.params if state.ema_params is None else state.ema_params, "_raw": state.params}
    row = {}
    for name, batches in evaluations.items():
        sums = dict.fromkeys(weights)
        for batch in batches:
            for suffix, params in weights.items():
                hits = eval_step(params, state.batch_stats, batch)
                sums[suffix] = hits if sums[suffix] is None else {k: sums[suffix][k] + hits[k] for k in hits}
            alive()
        for suffix, hits in jax.device_get(sums).items():
            row |= {f"{name}/{metric}{suffix}": value.compute() for metric, value in hits.items()}
    return row


def _resolve(config: ConfigDict) -> ConfigDict:
    """A copy in which the trusted batch size is a number."""
    config = ConfigDict(config.copy_and_resolve_references())
    config.trusted.batch_size = config.trusted.batch_size or config.batch_size
    return config


def _check_best_metric(config: ConfigDict, run: program.Program, evaluations: Iterable[str]) -> None:
    kinds = [f"{metric}{suffix}" for metric in ("accuracy", "top5_accuracy") for suffix in ("", "_raw")]
    known = [f"{name}/{kind}" for name in evaluations for kind in kinds] + sorted(run.window.averages)
    if config.checkpoint.keep_best:
        check_choice("checkpoint.best_metric", config.checkpoint.best_metric, known)


@contextlib.contextmanager
def _storage_errors(checkpoints: checkpointing.Checkpoints):
    """What the writers of files raise, as StorageError."""
    try:
        yield
    except (OSError, asynclib.AsyncError) as error:
        raise StorageError(f"the work folder cannot be written: {first_line(error)}; {checkpoints.newest()}") from error


def _closing(resource: Any) -> Callable[..., None]:
    """Closes the resource at the end; trouble with that does not take the place of an error that came before."""

    def leave(kind, error, trace):
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            resource.close()

    return leave


def _check_finite(window: metrics.Window, checkpoints: checkpointing.Checkpoints) -> None:
    bad = metrics.first_bad(window)
    if bad is None:
        return
    step, names = bad
    checkpoints.wait()
    raise NonFiniteError(
        f"step {step}: {', '.join(names)} not finite; {checkpoints.newest()}. A smaller schedule.base_lr, or data "
        f"without extreme values, is what usually helps"
    )


def _speed(
    config: ConfigDict, flops: float, num_steps: int, seconds: float, parts: dict[str, float]
) -> dict[str, float]:
    """Metrics of the speed of `num_steps` steps that took `seconds`; time/… are seconds per step."""
    row = {"speed/images_per_second": num_steps * config.batch_size / seconds}
    utilization = observability.flops_utilization(flops, seconds / num_steps)
    if utilization:
        row["speed/flops_utilization"] = utilization
    return row | {f"time/{part}": value / num_steps for part, value in parts.items()}


def _ends_epoch(step: int, batch_size: int, num_examples: int) -> bool:
    return step * batch_size // num_examples > (step - 1) * batch_size // num_examples


def _accuracies(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The accuracies of result.json from the rows of metrics.jsonl."""
    evaluated = [row for row in rows if f"{name}/accuracy" in row]
    trusted = [row for row in rows if "trusted/accuracy" in row]
    auroc = [row["weight/auroc"] for row in rows if "weight/auroc" in row]
    last = evaluated[-1] if evaluated else {}
    best = max((row[f"{name}/accuracy"] for row in evaluated), default=None)
    # The last of the best: a small trusted set is often classified without error from early on.
    chosen = max(evaluated, key=lambda row: (row["trusted/accuracy"], row["step"]), default={})
    return {
        f"{name}_accuracy": last.get(f"{name}/accuracy"),
        f"{name}_accuracy_raw": last.get(f"{name}/accuracy_raw"),
        f"{name}_top5_accuracy": last.get(f"{name}/top5_accuracy"),
        f"{name}_accuracy_best": best,
        "best_chosen_on": name,
        f"{name}_accuracy_best_on_trusted": chosen.get(f"{name}/accuracy"),
        "trusted_accuracy": trusted[-1]["trusted/accuracy"],
        "weight_auroc": auroc[-1] if auroc else None,
    }


def _headline(row: dict[str, Any], name: str) -> dict[str, float]:
    keys = {
        "loss/total": "loss",
        "train/accuracy": "train",
        "weight/auroc": "ω-AUROC",
        f"{name}/accuracy": name,
        "speed/images_per_second": "images/s",
    }
    return {short: row[key] for key, short in keys.items() if key in row}
