"""Prints what is known about a compiled step."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from ieg_jax.hardware import GIB, Chip
from ieg_jax.plan import hlo
from ieg_jax.plan.compile import least_forward_passes
from ieg_jax.plan.roofline import roofline

# XLA's own estimate of the time is shown only where it is at least this share of the bound. A shorter one is wrong.
SANE = 0.3


def summarize(step: Any, chip: Chip) -> dict[str, Any]:
    """Returns a row: what the report shows of a step, as plain values. Bytes and FLOPs are those of one chip.

    Args:
      step: a `plan.compile.Step`.
      chip: for which it was compiled.
    """
    compiled, config = step.compiled, step.config
    by_kind: dict[str, dict[str, float]] = {}
    for one in compiled.collectives:
        kind = by_kind.setdefault(one["kind"], {"count": 0, "bytes": 0, "sent_bytes": 0.0})
        kind["count"] += one["count"]
        kind["bytes"] += one["bytes"]
        kind["sent_bytes"] += one["sent_bytes"]
    row = {
        "batch_size": config.batch_size,
        "batch_groups": config.batch_groups,
        "microbatches": config.microbatches,
        "remat": config.model.remat,
        "dtype": config.model.dtype,
        "fsdp": config.mesh.fsdp,
        "method": config.method.name,
        "model": config.model.name,
        "num_chips": step.num_chips,
        "unit": math.lcm(step.num_chips, config.batch_groups),
        "arguments": step.arguments,
        "seconds": {**step.seconds, "compile": compiled.compile_seconds},
        "usable_bytes": chip.usable_bytes,
        **dataclasses.asdict(compiled),
        "fits": bool(compiled.memory) and compiled.needed <= chip.usable_bytes,
        "by_kind": by_kind,
        "sent_bytes": sum(kind["sent_bytes"] for kind in by_kind.values()),
    }
    if compiled.memory:
        bound = roofline(chip, compiled.flops, compiled.traffic, row["sent_bytes"])
        row["bound"] = {**dataclasses.asdict(bound), "seconds": bound.seconds, "binds": bound.binds}
        row["images_per_second"] = config.batch_size / bound.seconds
        row["flops_per_image"] = compiled.flops * step.num_chips / config.batch_size
        row["most_utilization"] = bound.compute / bound.seconds
        passes = least_forward_passes(config)
        row["flops_over_least"] = None
        if passes and step.forward_flops:
            row["flops_over_least"] = compiled.flops * step.num_chips / (passes * step.forward_flops)
    return row


def fixed_bytes(row: Mapping[str, Any]) -> int:
    """Returns the bytes of HBM that surely do not grow with the batch, those of the state and of the program."""
    changing = ("batch", "window of metrics")
    state = sum(size for name, size in row["arguments"].items() if name not in changing)
    return state + row["memory"].get("code", 0)


def notes(row: Mapping[str, Any], chip: Chip, largest: int) -> list[str]:
    """Says in plain sentences what limits the step, and what can be done about it.

    Args:
      row: from `summarize`.
      chip: for which it was compiled.
      largest: the estimate of the largest batch that fits; -1 = not known.
    """
    said = []
    groups, chips = row["batch_groups"], row["num_chips"]
    if not row["fits"]:
        said.append(
            "It does not fit. What helps, the cheapest first: a smaller batch, model.dtype=bfloat16, model.remat=True, "
            "microbatches (with batch_groups a multiple of chips × microbatches), mesh.fsdp where the state is what "
            "is large, more chips."
        )
    else:
        bound = row["bound"]
        others = sorted(
            (bound[name] / bound["seconds"], name)
            for name in ("compute", "memory", "interconnect")
            if name != bound["binds"]
        )
        what = {
            "compute": "the matrix units are the limit: fewer operations or more chips make a step faster",
            "memory": "reading and writing HBM is the limit"
            + (": model.dtype=bfloat16 makes activations half as large" if row["dtype"] == "float32" else ""),
            "interconnect": "sending between chips is the limit: a larger batch on each chip, or batch_groups, helps",
        }[bound["binds"]]
        said.append(
            f"{bound['binds'].capitalize()} binds: {what}. Beside it {others[1][1]} takes {others[1][0]:.0%} and "
            f"{others[0][1]} {others[0][0]:.0%} of the time."
        )
        said.append(
            f"No step can use more than {row['most_utilization']:.0%} of the chip's peak ("
            f"{chip.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, which float32 convolutions use too). A real step takes "
            "longer than the bound; compare speed/flops_utilization in metrics.jsonl."
        )
        if largest > row["batch_size"]:
            said.append(f"There is room: a batch of about {largest} fits, {largest // chips} on each chip.")
    if chips > 1 and groups % chips:
        said.append(
            f"batch_groups={groups} mixes examples of different chips: batch-norm statistics, and of a method with "
            f"mixup the pool with its images, cross chips at every step. batch_groups={chips} keeps them where they "
            "are, as the authors' runs on several GPUs did; it means batch norm and mixup partners inside each chip's "
            "part."
        )
    if row["unknown_loops"]:
        said.append(f"Of {len(row['unknown_loops'])} loops the count is not known; they are counted as one run.")
    return said


def print_report(console: Console, row: Mapping[str, Any], slice_: Any, largest: int, measured: int) -> None:
    """Prints everything about one step.

    Args:
      console: where to print.
      row: from `summarize`.
      slice_: a `plan.compile.Slice`.
      largest: the estimate of the largest batch that fits; -1 = not known.
      measured: of how many compiled batch sizes the estimate is made.
    """
    chip = slice_.chip
    console.print(
        f"\n[bold]{row['model']}, {row['method']}, batch {row['batch_size']} on {row['num_chips']} {chip.name} chips "
        f"({slice_.name})[/bold]: {row['batch_size'] / row['num_chips']:g} images on each, {row['dtype']}, "
        f"batch_groups={row['batch_groups']}, microbatches={row['microbatches']}, remat={row['remat']}, "
        f"fsdp={row['fsdp']}"
    )
    console.print(_memory_table(row, chip))
    if row["refused"]:
        console.print(f"[red]The compiler refuses the program:[/red] {row['refused']}", markup=True, highlight=False)
    if row["memory"]:
        console.print(_time_table(row, chip))
        console.print(_collective_table(row))
    sizes = "one compiled size, all that is temporary taken as proportional to the batch" if measured == 1 else (
        f"{measured} compiled sizes, memory taken as linear in the batch"
    )  # fmt: skip
    if largest >= 0:
        console.print(f"Largest batch that fits, estimated from {sizes}: [bold]{largest}[/bold]")
    seconds = row["seconds"]
    console.print(
        f"On this machine: trace {seconds['trace']:.1f} s, lower {seconds['lower']:.1f} s, compile "
        f"{seconds['compile']:.1f} s"
    )
    for note in notes(row, chip, largest):
        console.print(f"• {note}", highlight=False)


def sweep_table(rows: list[Mapping[str, Any]]) -> RichTable:
    """Returns a table with one line for each variant."""
    table = RichTable(title="variants, per chip")
    for heading in (
        "batch", "batch_groups", "remat", "HBM GiB", "fits", "operations", "HBM traffic", "sent", "bound ms", "binds",
        "images/s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [str(row["batch_size"]), str(row["batch_groups"]), "on" if row["remat"] else "off"]
        cells += [f"{row['needed'] / GIB:.2f}" if row["needed"] else "?", "yes" if row["fits"] else "[red]no[/red]"]
        if row["memory"]:
            cells += [
                _si(row["flops"], "FLOP"),
                _si(row["traffic"], "B"),
                _si(row["sent_bytes"], "B"),
                f"{row['bound']['seconds'] * 1e3:.2f}",
                row["bound"]["binds"],
                f"{row['images_per_second']:,.0f}",
            ]
        table.add_row(*cells)
    return table


def _memory_table(row: Mapping[str, Any], chip: Chip) -> RichTable:
    """Returns the table that says what takes how much device memory."""
    table = RichTable(title="memory of a chip (HBM)")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in row["arguments"].items():
        if size:
            table.add_row(name, f"{size / GIB:.3f}")
    memory = row["memory"]
    if memory:
        rest = memory["arguments"] - sum(row["arguments"].values()) + memory["outputs"]
        table.add_row("padding, outputs", f"{rest / GIB:.3f}")
        table.add_row("activations and other temporary arrays", f"{memory['temporary'] / GIB:.3f}")
        table.add_row("program", f"{memory['code'] / GIB:.3f}", end_section=True)
    table.add_row("[bold]needed[/bold]", f"[bold]{row['needed'] / GIB:.3f}[/bold]" if row["needed"] else "?")
    usable = f"a program can have, of {chip.memory_bytes / GIB:g}"
    table.add_row(usable, f"{chip.usable_bytes / GIB:.3f}")
    table.add_row("", "[green]it fits[/green]" if row["fits"] else "[bold red]IT DOES NOT FIT[/bold red]")
    return table


def _time_table(row: Mapping[str, Any], chip: Chip) -> RichTable:
    """Returns the table of what a chip does in a step, and how long each part takes at least."""
    bound = row["bound"]
    table = RichTable(title="work of a chip in a step, and the least time for it")
    table.add_column("what")
    for heading in ("amount", "at best", "ms"):
        table.add_column(heading, justify="right")
    for name, part, amount, rate, unit in (
        ("operations", "compute", row["flops"], chip.peak_flops, "FLOP"),
        ("HBM read and written", "memory", row["traffic"], chip.memory_bandwidth, "B"),
        ("sent to other chips", "interconnect", row["sent_bytes"], chip.link_bandwidth, "B"),
    ):
        table.add_row(name, _si(amount, unit), f"{_si(rate, unit)}/s", f"{bound[part] * 1e3:.3f}")
    table.add_section()
    bold = f"[bold]{bound['seconds'] * 1e3:.3f}[/bold]"
    table.add_row("[bold]a step takes at least[/bold]", "", f"{bound['binds']} binds", bold)
    table.add_row("images/s of all chips, at most", f"{row['images_per_second']:,.0f}", "", "")
    table.add_row("operations per image", _si(row["flops_per_image"], "FLOP"), "", "")
    if row["flops_over_least"]:
        table.add_row("operations over the least possible", f"{row['flops_over_least']:.3f}", "", "")
    if row["xla_seconds"] >= SANE * bound["seconds"]:
        table.add_row("XLA's own estimate", "", "", f"{row['xla_seconds'] * 1e3:.3f}")
    return table


def _collective_table(row: Mapping[str, Any], largest: int = 6) -> RichTable:
    """Returns the table of what chips send to each other, with the `largest` collectives of each kind."""
    table = RichTable(title="sent between chips in a step, per chip")
    for heading in ("what", "count", "size", "sent", "largest array", "comes from"):
        table.add_column(heading, justify="right" if heading in ("count", "size", "sent") else "left")
    for kind, total in row["by_kind"].items():
        table.add_row(
            f"[bold]{kind}[/bold]", str(total["count"]), _si(total["bytes"], "B"), _si(total["sent_bytes"], "B")
        )
        ones = [one for one in row["collectives"] if one["kind"] == kind]
        for one in ones[:largest]:
            more = f" and {len(one['arrays']) - 1} more" if len(one["arrays"]) > 1 else ""
            table.add_row(
                f"  {one['name']}", str(one["count"]), _si(one["bytes"], "B"), _si(one["sent_bytes"], "B"),
                _largest_array(one["arrays"]) + more, _end_of(one["source"].partition("/")[2]),
            )  # fmt: skip
        if len(ones) > largest:
            table.add_row(f"  {len(ones) - largest} smaller")
    if not row["by_kind"]:
        table.add_row("nothing")
    return table


def _si(value: float, unit: str) -> str:
    """Formats a value with three digits and a decimal prefix, such as 1.23 GB."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}" if value / size < 1000 else f"{value / size:.0f} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _end_of(text: str, length: int = 40) -> str:
    """Returns the last characters of a text. They tell most about an operation, whose name is a path."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _largest_array(arrays: list[str]) -> str:
    """Returns the array with the most bytes; arrays are texts such as `f32[8,3]`."""
    return max(arrays, key=lambda text: hlo.parse_arrays(text)[0].bytes)
