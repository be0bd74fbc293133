"""Compiles a configuration and its variants for a slice, and reports what comes out."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from ieg_jax import files
from ieg_jax.errors import StorageError, UserError
from ieg_jax.plan import report, supply, sweep
from ieg_jax.plan.compile import Slice, compile_step, open_slice, versions


def run(
    config: ConfigDict, topology: str, sweeps: Sequence[str], out: str, console: Console, host: supply.Host
) -> None:
    """Compiles the step of a configuration and of its variants, prints the report and writes it.

    Args:
      config: the configuration.
      topology: the slice, such as `v5e:4x4`.
      sweeps: which variants are compiled too: batch, remat, batch_groups.
      out: a file for everything as JSON; "" = none.
      console: where to print.
      host: what is known of each host of the slice, on whose data its chips may have to wait.

    Raises:
      UserError: for a slice that does not exist, a configuration that cannot be used with it, and a file that cannot be
        written.
    """
    slice_ = open_slice(topology)
    rows: list[dict[str, Any]] = []

    def compile_row(variant: ConfigDict) -> dict[str, Any]:
        rows.append(_compile(variant, slice_))
        return rows[-1]

    first = compile_row(config)
    if "batch" in sweeps:
        sweep.sweep_batch(config, first, compile_row, rows)
    for variant in sweep.variants(config, first["num_chips"], sweeps):
        compile_row(variant)
    same = sweep.same_but_batch(rows, first)
    largest = sweep.largest(same)
    report.print_report(console, first, slice_, largest, len(same))
    if len(rows) > 1:
        console.print(report.sweep_table(rows))
    data = supply.supply(config, first, host, slice_.num_hosts)
    if data is not None:
        console.print(supply.table(*data))
    if out:
        content = {
            "config": config.to_dict(),
            "topology": slice_.name,
            "chip": dataclasses.asdict(slice_.chip),
            "versions": versions(),
            "largest_batch_estimate": largest,
            "input": None if data is None else supply.as_dict(host, slice_.num_hosts, *data),
            "steps": rows,
        }
        try:
            files.write(pathlib.Path(out).expanduser(), json.dumps(content, indent=1, default=str))
        except StorageError as error:
            raise UserError(f"--out={out}: {error}") from None
    if first["memory"]:
        console.print(supply.UNKNOWN if data is None else str(data[1]), highlight=False, soft_wrap=True)


def _compile(config: ConfigDict, slice_: Slice) -> dict[str, Any]:
    """Returns `report.summarize` of one variant. Before anything that takes long, a line goes to standard error."""
    what = (
        f"{config.model.name}, {config.method.name}, batch {config.batch_size}, batch_groups {config.batch_groups}, "
        f"remat {config.model.remat}, for {slice_.name}"
    )

    def tell(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}: {text}", file=sys.stderr, flush=True)

    return report.summarize(compile_step(config, slice_, tell), slice_.chip)
