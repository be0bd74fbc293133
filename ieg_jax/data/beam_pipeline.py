"""Writes sharded records as a pipeline of Apache Beam: `python -m ieg_jax.data.prepare --runner=…`.

One element is one shard, which a worker writes and verifies whole, as the command does without Beam. So the files are
the same, bit for bit, wherever they were written. The writers of records that Beam and TFDS have are of no use here:
they choose themselves in which shard, and where in it, an example stands.

Workers are told of their shards by files, `parts/*.task`, for what a pipeline itself may hold is limited, and the paths
and labels of a large data set are more.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from ieg_jax import files
from ieg_jax.data import images
from ieg_jax.data.shards import Shards, Task, Write, settle
from ieg_jax.errors import UserError

if TYPE_CHECKING:
    import apache_beam

DIRECT, DATAFLOW = "DirectRunner", "DataflowRunner"
INSTALL = "pip install 'ieg_jax[beam]'"


def writer(runner: str, options: Sequence[str], out: epath.PathLike) -> Write:
    """Makes what `shards.prepare` writes by; nothing runs yet.

    Args:
      runner: the name that Beam has for it; DIRECT and DATAFLOW were thought of.
      options: of Beam's pipeline, `key=value`, or `key` for a switch.
      out: folder for the records.

    Raises:
      UserError: where Apache Beam is missing, for options that it does not know or lacks, and for a folder that
        Dataflow's workers cannot reach.
    """
    if runner == DATAFLOW and not files.is_remote(out):
        raise UserError(f"--out={out}: Dataflow's workers do not see this disk; expected a folder gs://…")
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(f"--runner={runner} needs the package apache-beam: {INSTALL}")
    return functools.partial(_write, runner, _pipeline(runner, options))


def _pipeline(runner: str, options: Sequence[str]) -> apache_beam.Pipeline:
    """An empty pipeline with these options."""
    import apache_beam  # takes seconds, and is there only for who wants it
    from apache_beam.options.pipeline_options import PipelineOptions

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):  # argparse prints its messages and exits
            parsed = PipelineOptions([f"--{option}" for option in options], runner=runner)
            unknown = parsed.get_all_options(retain_unknown_options=True).keys() - PipelineOptions([]).get_all_options()
    except SystemExit:
        reason = told.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"--beam_options={','.join(options)}: {reason}") from None
    if unknown:
        raise UserError(f"--beam_options: Apache Beam {apache_beam.__version__} knows no {', '.join(sorted(unknown))}")
    try:
        return apache_beam.Pipeline(options=parsed)
    except ValueError as error:  # an option is missing, such as Dataflow's project
        raise UserError(f"--beam_options={','.join(options)}: {' '.join(str(error).split())}") from None
    except ImportError as error:
        raise UserError(f"--runner={runner}: {error}: {INSTALL}") from None


def _write(runner: str, pipeline: apache_beam.Pipeline, shards: Shards, out: epath.Path) -> None:
    """Settles all tasks by a pipeline; see `shards.Write`.

    Raises:
      UserError: for image files that Dataflow's workers cannot reach, and where the pipeline did not come to its end.
    """
    for name, split in shards.splits.items():
        if runner == DATAFLOW and not split.is_remote:
            raise UserError(
                f"the {name} images are on this disk ({split.images.paths[0]}), which Dataflow's workers do not see; "
                f"copy them to a bucket and name them there, or use --runner={DIRECT}"
            )
    import apache_beam  # see above
    from apache_beam.runners.runner import PipelineState

    tasks = send(shards, files.absolute(out))
    _ = pipeline | "shards" >> apache_beam.Create(tasks) | "write" >> apache_beam.Map(settle_sent)
    result = pipeline.run()
    try:
        state = result.wait_until_finish()
    except KeyboardInterrupt:
        result.cancel()  # else Dataflow would go on
        raise
    if state != PipelineState.DONE:
        raise UserError(f"the pipeline ended as {state}; the same command goes on with the shards that are missing")
    with _threads(out) as pool:
        list(pool.map(lambda task: epath.Path(task).unlink(), tasks))


def send(shards: Shards, out: epath.Path) -> list[str]:
    """Writes each task to a file in `out`, which `prepare` has begun; returns the files, the elements of a pipeline."""

    def write(shard: tuple) -> str:
        task = shards.task(*shard)
        file = out / "parts" / f"{task.split}-{task.number:05d}.task"
        files.write_json(file, dataclasses.asdict(task), indent=None)
        return str(file)

    with _threads(out) as pool:
        return list(pool.map(write, shards.files()))


def _threads(out: epath.Path) -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(images.reads_at_once([str(out)]))


def settle_sent(file: str) -> None:
    """Settles a task that was sent as a file; a worker calls it."""
    path = epath.Path(file)
    settle(Task(**json.loads(path.read_text())), path.parent.parent)
