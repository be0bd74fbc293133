"""The file and the table: what was measured, on what, with which versions, beside which other load."""

import datetime
import json
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from etils import epath
from rich.table import Table

from benchmarks.bench import measure
from ieg_jax import files
from ieg_jax.errors import UserError
from ieg_jax.runtime import workdir

FORMAT = 1
RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
DIGITS = 5  # of samples in the file

Report = dict[str, Any]
"""`format`, `date`, `machine`, `versions`, `commit`, `arguments`, `seconds` (of each part), `notes`, `load`, `rows`."""


def machine() -> dict[str, Any]:
    """The processor, its cores that this process may use, GiB of memory, and the devices of jax."""
    model, memory = platform.processor() or platform.machine(), None
    try:
        model = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())[1]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, TypeError, ValueError):  # not Linux
        pass
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    gib = memory and round(memory, 1)
    return {"processor": model, "cores": measure.cores(), "memory_gib": gib, "devices": devices}


def make(
    rows: Mapping[str, measure.Row], seconds: Mapping[str, float], notes: list[str], arguments: Mapping[str, Any]
) -> Report:
    """A report of rows.

    Args:
      rows: name -> row, see `measure.Row`.
      seconds: of each part.
      notes: sentences, such as which peer was not there.
      arguments: of the command.
    """
    provenance = workdir.provenance()
    versions = {"python": platform.python_version()} | provenance["versions"]
    try:
        versions["torch"] = metadata.version("torch")
    except metadata.PackageNotFoundError:
        versions["torch"] = None
    for name, row in rows.items():
        if "version" in row:  # of a peer in an interpreter of its own
            versions[name.split(", ")[-1]] = row["version"]
    load = [one for row in rows.values() for one in row.get("others", []) if one is not None]
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions,
        "commit": provenance["commit"],
        "arguments": dict(arguments),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "notes": notes,
        "load": {"median": _rounded(statistics.median(load)), "most": _rounded(max(load))} if load else None,
        "rows": {name: summarised(row) for name, row in rows.items()},
    }


def summarised(row: measure.Row) -> measure.Row:
    """A row with `median` and `quartiles` of its samples, all numbers rounded."""
    samples = sorted(row["samples"])
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    found = row | {"median": statistics.median(samples), "quartiles": [quartiles[0], quartiles[-1]]}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def ratio(rows: Mapping[str, measure.Row], name: str) -> float | None:
    """A row as a multiple of its base: the median over the rounds, where both were measured in the same ones.

    None without a base, and where the base is 0, as hundredths of a second can be.
    """
    row = rows[name]
    base = rows.get(row.get("base"))
    if base is None or not min(base["samples"]):
        return None
    if len(base["samples"]) != len(row["samples"]):
        return row["median"] / base["median"]
    return statistics.median(one / other for one, other in zip(row["samples"], base["samples"], strict=True))


def path_of(report: Report, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """A new file for a report, by its date and the kind of its machine."""
    kind = re.sub(r"[^a-z0-9]+", "-", report["machine"]["processor"].lower()).strip("-")
    stem = f"{report['date'][:10]}-{kind}-{report['machine']['cores']}-cores"
    names = (stem + suffix for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
    return next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())


def write(report: Report, path: pathlib.Path) -> None:
    """Writes a report, a row to a line, so that git shows what changed."""
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(k, ensure_ascii=False)}: {json.dumps(v)}" for k, v in report["rows"].items())
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(epath.Path(path), f'{head[:-2]},\n "rows": {{\n{rows}\n }}\n}}\n')


def read(path: str) -> Report:
    """Reads a report.

    Raises:
      UserError: where the file is not there, is no report, or is one of another format.
    """
    try:
        report = json.loads(pathlib.Path(path).read_text())
        check(report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is no report of this benchmark ({error}); expected one of benchmarks/results"
        ) from None
    return report


def check(report: Report) -> None:
    """Raises ValueError where a report is not as `make` makes it."""
    if report["format"] != FORMAT:
        raise ValueError(f"format {report['format']}, expected {FORMAT}")
    for name in ("date", "machine", "versions", "commit", "arguments", "seconds", "notes", "load"):
        if name not in report:
            raise ValueError(f"no {name}")
    for name, row in report["rows"].items():
        if not row["samples"] or not all(isinstance(one, int | float) for one in row["samples"]):
            raise ValueError(f"{name}: samples {row['samples']}")
        if row["unit"] != "s" and not row["unit"]:
            raise ValueError(f"{name}: no unit")
        low, high = row["quartiles"]
        if not low <= row["median"] <= high:
            raise ValueError(f"{name}: median {row['median']} outside of its quartiles {low} to {high}")
        if "others" in row and len(row["others"]) != len(row["samples"]):
            raise ValueError(f"{name}: {len(row['others'])} loads of {len(row['samples'])} samples")


HEADINGS = (
    "what", "median", "quartiles", "unit", "× base", "GFLOP", "× base", "least", "GFLOP/s", "peak MiB", "others",
)  # fmt: skip


def table(report: Report) -> Table:
    """The one table: a section for each part and network."""
    title = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    here, load = report["machine"], report["load"]
    beside = f"others used {load['median']:.2g} cores (median), {load['most']:.2g} (most)" if load else "load not known"
    found = Table(
        title=f"{report['date']}, {here['processor']}, {here['cores']} cores; {beside}",
        caption="\n".join([title, f"commit {report['commit']}", *report["notes"]]),
    )
    for heading in HEADINGS:
        found.add_column(heading, justify="left" if heading in ("what", "unit") else "right", no_wrap=True)
    rows, section = report["rows"], None
    for name in rows:
        ours = name.rpartition("/")[0] if name.startswith("step/") else name.split("/")[0]
        if section not in (None, ours):
            found.add_section()
        section = ours
        found.add_row(*cells(rows, name))
    return found


def cells(rows: Mapping[str, measure.Row], name: str) -> list[str]:
    """The cells of a row, as HEADINGS names them; "" for what does not apply."""
    row = rows[name]
    base, times = rows.get(row.get("base")), ratio(rows, name)
    others = [one for one in row.get("others", []) if one is not None]
    gflop = row.get("gflop")
    of_base = {
        key: row[key] / base[key] if base and row.get(key) and base.get(key) else None for key in ("gflop", "passes")
    }
    return [
        name,
        number(row["median"]),
        "–".join(map(number, row["quartiles"])) if len(row["samples"]) > 1 else "",
        row["unit"],
        "" if times is None else f"{times:.2f}",
        number(gflop),
        f"{of_base['gflop']:.2f}" if of_base["gflop"] else "",
        f"{of_base['passes']:.2f}" if of_base["passes"] else "",
        number(gflop / row["median"]) if gflop and row["unit"] == "s" else "",
        f"{row['mib']:,.0f}" if "mib" in row else "",
        f"{statistics.mean(others):.1f}" if others else "",
    ]


def number(value: float | None) -> str:
    """A number with three digits that count; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(report: Report) -> str:
    """The table for a page."""
    lines = [
        HEADINGS,
        ["---"] + ["--:"] * (len(HEADINGS) - 1),
        *(cells(report["rows"], name) for name in report["rows"]),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(old: Report, new: Report) -> Table:
    """What changed since an earlier report: new / old of the medians and of the operations, for rows of both."""
    found = Table(title=f"{new['date']} beside {old['date']}", caption="\n".join(differences(old, new)))
    for heading in ("what", "unit", "then", "now", "now / then", "GFLOP, now / then", "others, then", "others, now"):
        found.add_column(heading, justify="left" if heading in ("what", "unit") else "right")
    for name, row in new["rows"].items():
        before = old["rows"].get(name)
        if before is None or before["unit"] != row["unit"]:
            continue
        flops = f"{row['gflop'] / before['gflop']:.3f}" if row.get("gflop") and before.get("gflop") else ""
        load = [cells(side["rows"], name)[-1] for side in (old, new)]
        times = f"{row['median'] / before['median']:.2f}" if before["median"] else ""
        found.add_row(name, row["unit"], number(before["median"]), number(row["median"]), times, flops, *load)
    return found


def differences(old: Report, new: Report) -> list[str]:
    """Sentences on what makes two reports hard to compare: another machine, other versions, rows that one lacks."""
    said = []
    for what in ("machine", "versions", "arguments"):
        changed = [
            f"{name} {old[what].get(name)} -> {new[what].get(name)}"
            for name in sorted({*old[what], *new[what]})
            if old[what].get(name) != new[what].get(name)
        ]
        said += [f"{what}: {', '.join(changed)}"] if changed else []
    lacking = [len(set(a["rows"]) - set(b["rows"])) for a, b in ((old, new), (new, old))]
    if any(lacking):
        said.append(f"{lacking[0]} rows then and not now, {lacking[1]} now and not then")
    return said
