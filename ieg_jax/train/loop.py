"""Training, from a configuration to result.json. Reads from top to bottom.

A run can start in four ways, decided by what is in the work folder:

1. nothing: it starts at step 0;
2. a run with the same configuration that was interrupted: it goes on from the newest checkpoint that is not damaged,
   and everything it computes and logs is what it would have been without the interruption;
3. a finished run with the same configuration: it is reported, nothing is trained;
4. a run with another configuration: an error that names the differing keys.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files
from ieg_jax.data.load import Load, load_data
from ieg_jax.errors import Interrupted, NonFiniteError, StorageError, first_line
from ieg_jax.lazy import asynclib
from ieg_jax.models import convolution, pretrained
from ieg_jax.runtime import mesh, processes, watch
from ieg_jax.runtime.checkpoints import Checkpoints, checkpoints_exist
from ieg_jax.runtime.claim import Claim
from ieg_jax.runtime.progress import Reporter
from ieg_jax.runtime.workdir import RATE, WorkFolder, check_network, class_name, provenance
from ieg_jax.train import begin, check, dashboard, evaluation, examples, look, metrics, tracking
from ieg_jax.train.begin import Progress, Run


def train_and_evaluate(
    config: ConfigDict, workdir: str, network: nn.Module | None = None, quiet: bool = False, load: Load = load_data
) -> dict[str, Any]:
    """Trains what `config` says in the work folder `workdir`.

    Where several processes run together, each calls this with the same arguments (`processes.initialize` first).

    Args:
      config: see configs/default.py. Not changed.
      workdir: folder for checkpoints, metrics and the result; local or on a bucket.
      network: any linen module that fits `models.own.adapt`, in place of the one that `config.model` names. The work
        folder notes its class in network.json; `inference.load` then wants it too.
      quiet: nothing is shown while it trains.
      load: `load_data`, or a `LoadOnce`.

    Returns:
      The contents of result.json.

    Raises:
      UserError: for a configuration, data or work folder that cannot be used; before anything is compiled.
      NonFiniteError: where a metric becomes nan or infinite.
      StorageError: where the work folder can no longer be written; what it held before is intact.
      Interrupted: after SIGTERM or SIGINT to any process, when the state has been saved; or in compilation.
    """
    # ---- What is to be done, and has it been done?
    began = time.monotonic()
    with processes.together():
        config = config_lib.resolve(config)
        check.validate(config)
        shardings = mesh.create(config)
    folder = WorkFolder(workdir, writes=jax.process_index() == 0)
    processes.check_same("the configuration", config.to_json())
    processes.check_shared(folder.path, "--workdir")
    with processes.together():
        finished = folder.check(config)
        check_network(folder.path, network)
    finished = json.loads(processes.from_first(json.dumps(finished)))
    if finished is not None:
        return finished
    with Claim(folder.path) as claim:
        with processes.together():
            if jax.process_index() == 0:
                claim.take()
        return _run(config, folder, shardings, network, quiet, load, claim, began)


def _run(
    config: ConfigDict,
    folder: WorkFolder,
    shardings: mesh.Shardings,
    network: nn.Module | None,
    quiet: bool,
    load: Load,
    claim: Claim,
    began: float,
) -> dict[str, Any]:
    """Trains in a folder that is this run's, from where it is to the end; see `train_and_evaluate`."""
    with processes.together():
        begins = not checkpoints_exist(folder.path / "checkpoints")
        file = pretrained.read(config.model) if begins else None
        tracking.check_login(config)

    # ---- The data, and the functions that are compiled for them.
    run = begin.prepare(config, folder, shardings, network, quiet, load)
    with processes.together():
        weights = pretrained.fit(file, run.config.model, run.program.one_network)
    processes.check_same("the file of model.pretrained", file.sha256 if file else "")
    begin.write_down(run, network)

    # ---- Where it starts, the steps, the result.
    title = f"{config.method.name} on {run.data.name}{begin.noise_in_words(config, run.data.noise_report)}"
    reporter = Reporter(title, run.steps.num_steps, visible=jax.process_index() == 0 and not quiet)
    for notice in begin.notices(run):
        reporter.say(f"note: {notice}")
    checkpoints = Checkpoints(folder.path / "checkpoints", config.checkpoint, run.steps.reported)
    progress = begin.start(run, checkpoints, weights, reporter, began)
    _train(run, progress, checkpoints, reporter, claim)
    if progress.state.examples is not None:
        folder.write_arrays("examples.npz", examples.averages(jax.device_get(progress.state.examples)))
    result = _result(run, progress, network)
    folder.write("result.json", result)
    reporter.say(f"done, result in {folder.path / 'result.json'}")
    return result


def _train(run: Run, progress: Progress, checkpoints: Checkpoints, reporter: Reporter, claim: Claim) -> None:
    """Makes the steps from `progress.start` to the end, and whatever belongs between them."""
    config, steps, folder = run.config, run.steps, run.folder
    with contextlib.ExitStack() as stack:
        stack.enter_context(_storage_errors(checkpoints))
        stack.push(_closing(checkpoints))
        stack.push(_closing(progress.writer))
        stack.enter_context(reporter)
        stop = stack.enter_context(processes.StopRequest())
        train_step, flops = _compile(run, progress, reporter, stop)
        watchdog = stack.enter_context(watch.Watchdog(folder.path, config.stall_minutes))
        profiler = watch.Profiler(folder.path, config.profile.start_step, config.profile.num_steps)
        stack.callback(profiler.close)
        clock = watch.Clock("data", "compute", "metrics", "evaluation", "checkpoint")
        last_log, batches = progress.start, begin.batches(run, progress.state, progress.start)
        for step in range(progress.start + 1, steps.num_steps + 1):
            with clock("data"):
                batch = next(batches)
            profiler.before(step)
            with clock("compute"):
                progress.state, progress.window = train_step(progress.state, progress.window, batch, run.step_rng)
                traced = profiler.after(step, progress.state)
            reporter.step(step, functools.partial(jax.block_until_ready, progress.window))
            if traced:
                reporter.say(f"a profile of the steps up to {step} is in {folder.path / 'plugins' / 'profile'}")
            row: dict[str, Any] = {}
            stopping, logging = stop.requested(step), steps.logs(step)
            saving = stopping or steps.saves(step)
            if logging or saving:
                claim.check()
                with clock("compute"):
                    window = jax.device_get(progress.window)
                _check_finite(window, checkpoints)
            if logging:
                with clock("metrics"):
                    row |= _summarize(run, progress, step, window)
                    profiler.look(step)
            if step in steps.eval_steps:
                with clock("evaluation"):
                    averaged, raw = look.fit(run.seen_after(progress.state, step))
                    progress.state = progress.state.replace(method=averaged)
                    eval_step = run.program.eval_step
                    row |= evaluation.evaluate(progress.state, run.evaluations, eval_step, watchdog.alive, raw)
                    row[RATE] = run.program.learning_rate(step)
            if logging:
                seconds, parts = clock.lap()
                training = seconds - parts["evaluation"]
                progress.training_seconds += training
                row |= _speed(config, flops, step - last_log, training, parts)
                last_log = step
            if row:
                with clock("metrics"):
                    _log(run, progress, step, row, reporter, checkpoints)
            if run.program.method.on_epoch and (steps.ends_epoch(step) or step == steps.num_steps):
                with clock("compute"):
                    progress.state = look.finish_epoch(run.seen_after(progress.state, step))
                batches = begin.batches(run, progress.state, step)
            if saving:
                # After the row: whatever a checkpoint covers has been written down, a kill in between only
                # makes the run compute it again.
                with clock("checkpoint"):
                    folder.flush()
                    checkpoints.save(step, (progress.state, progress.window), step * config.batch_size)
            if stopping and step < steps.num_steps:
                checkpoints.wait()
                raise Interrupted(f"stopped at step {step} of {steps.num_steps}, saved in {checkpoints.folder}")
            watchdog.alive()
        checkpoints.wait()


def _compile(run: Run, progress: Progress, reporter: Reporter, stop: processes.StopRequest) -> tuple[Callable, float]:
    """The compiled step, and the operations of one device in it; 0 where they are not known."""
    began = time.monotonic()
    train_step = run.program.compiled_step(stop.wait)
    progress.compile_seconds = time.monotonic() - began
    reporter.compiled(progress.compile_seconds, progress.start)
    # XLA counts what is in a loop once, so that parts of a batch would be missing.
    flops = convolution.flops(train_step) if run.config.microbatches == 1 else 0.0
    return train_step, flops


def _summarize(run: Run, progress: Progress, step: int, window: metrics.Window) -> dict[str, float]:
    """The averages since the last logged step; the window is empty afterwards."""
    if window.examples is not None:
        omega = metrics.window_examples(window).weights
        progress.writer.write_histograms(step, {"weight/relative": omega * run.config.batch_size})
        if step in run.steps.picture_steps and jax.process_index() == 0:
            data, count = run.data, run.config.audit.suspects
            progress.writer.write_images(step, dashboard.suspects(window, data.train, data.class_names, count))
    progress.window = run.program.empty_window()
    return metrics.summarize(window)


def _log(
    run: Run, progress: Progress, step: int, row: dict[str, Any], reporter: Reporter, checkpoints: Checkpoints
) -> None:
    """Writes a row to metrics.jsonl, TensorBoard and W&B, and shows the most important of it."""
    row["speed/wall_seconds"] = progress.wall_seconds
    row["speed/eta_seconds"] = reporter.eta(step).total_seconds()
    progress.rows.append({"step": step, **row})
    run.folder.append(progress.rows[-1])
    progress.writer.write_scalars(step, row)
    reporter.metrics(step, evaluation.headline(row, run.data.evaluation_name))
    checkpoints.note_metrics(progress.rows[-1:])


def _result(run: Run, progress: Progress, network: nn.Module | None) -> dict[str, Any]:
    """The contents of result.json."""
    config, data, steps = run.config, run.data, run.steps
    return {
        "dataset": data.name,
        "noise": config.noise.kind,
        "noise_rate": config.noise.rate,
        "noise_rate_effective": data.noise_report["rate_effective"],
        "trusted_per_class": min(data.trusted_report["per_class"]),
        "method": config.method.name,
        "model": config.model.name if network is None else class_name(network),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(run.program.state.params)),
        "seed": config.seed,
        "steps": steps.num_steps,
        **evaluation.accuracies(progress.rows, data.evaluation_name, steps.reported),
        "label_auroc": evaluation.label_auroc(run.seen_after(progress.state, steps.num_steps), data.train),
        "wall_seconds": progress.wall_seconds,
        "compile_seconds": progress.compile_seconds,
        "images_per_second": progress.images_per_second(steps.num_steps, config.batch_size),
        "device_kind": jax.devices()[0].device_kind,
        "num_devices": run.shardings.num_devices,
        **provenance(),
    }


@contextlib.contextmanager
def _storage_errors(checkpoints: Checkpoints):
    """What the writers of files raise, as StorageError."""
    try:
        yield
    except (*files.storage_errors(), asynclib.AsyncError) as error:
        raise StorageError(f"the work folder cannot be written: {first_line(error)}; {checkpoints.newest()}") from error


def _closing(resource: Any) -> Callable[..., None]:
    """Closes the resource at the end; trouble with that does not take the place of an error that came before."""

    def leave(kind, error, trace):
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            resource.close()

    return leave


def _check_finite(window: metrics.Window, checkpoints: Checkpoints) -> None:
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
    utilization = watch.flops_utilization(flops, seconds / num_steps)
    if utilization:
        row["speed/flops_utilization"] = utilization
    return row | {f"time/{part}": value / num_steps for part, value in parts.items()}
