"""One table and one file of what the project costs here, beside other frameworks: `make bench`.

    python -m benchmarks.bench [--part=steps,peers] [--rounds=7] [--quick] [--torch_python=…/bin/python]
    python -m benchmarks.bench --compare=benchmarks/results/OLD.json
    python -m benchmarks.bench --read=NEW.json --compare=OLD.json     # measures nothing

docs/benchmarks.md says what is measured, and how.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import logging
from rich.console import Console

from benchmarks.bench import children, growth, options, pipeline, report, steps, storage
from configs import default
from ieg_jax import methods
from ieg_jax.errors import UserError
from ieg_jax.runtime import allocation, watch

PARTS = {
    "steps": steps.measure_networks,
    "methods": steps.measure_methods,
    "pipeline": pipeline.measure_pipeline,
    "startup": children.measure_startup,
    "growth": growth.measure_growth,
    "storage": storage.measure_storage,
}


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--part", default=",".join(options.PARTS), help="what is measured (default: %(default)s)")
    found.add_argument("--rounds", type=int, help="samples of each large step (default: 7, with --quick 3)")
    found.add_argument("--quick", action="store_true", help="about a minute: small networks, few samples")
    found.add_argument("--methods", default="all", help="all, or names: all of them on the small network")
    found.add_argument("--networks", default="", help="of the steps: WRN-28-2,ResNet29,ResNet-50,WRN-10-1")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for every step")
    found.add_argument("--keep_memory", action="store_true", help="as the flag of that name of ieg_jax.main")
    found.add_argument("--torch_python", default="", help="a Python that has torch (default: this one)")
    found.add_argument("--out", default="", help="file, or folder; '' = benchmarks/results, of --quick nowhere")
    found.add_argument("--compare", default="", metavar="OLD.json", help="print ratios to an earlier file too")
    found.add_argument("--read", default="", metavar="FILE.json", help="show a file and measure nothing")
    found.add_argument("--markdown", action="store_true", help="print the table for a page")
    found.add_argument(
        "--cache", default=".cache/xla", help="folder of compiled programs, '' = compile all (default: %(default)s)"
    )
    return found


def measured(values: argparse.Namespace, console: Console) -> report.Report:
    """Measures what the flags ask for."""
    chosen = options.Options(
        parts=tuple(values.part.split(",")),
        rounds=(3 if values.quick else 7) if values.rounds is None else values.rounds,
        quick=values.quick,
        methods=tuple(methods.REGISTRY) if values.methods == "all" else tuple(values.methods.split(",")),
        networks=tuple(filter(None, values.networks.split(","))),
        settings=options.settings_of(values.set, default.get_config()),
        torch_python=values.torch_python,
        say=lambda text: console.print(f"[dim]{time.strftime('%H:%M:%S')} {text}[/dim]", highlight=False),
    )
    if values.keep_memory:
        allocation.prepare()
    watch.enable_compilation_cache(values.cache)
    rows, seconds, notes = {}, {}, []
    asked = {part for part in PARTS if part in chosen.parts or (part == "steps" and "peers" in chosen.parts)}
    try:
        for part in filter(asked.__contains__, PARTS):
            began = time.perf_counter()
            found, said = PARTS[part](chosen)
            rows, notes, seconds[part] = rows | found, notes + said, time.perf_counter() - began
    except KeyboardInterrupt:  # what was measured before is not lost
        notes.append(f"stopped in the part {part}")
    shown = ("part", "rounds", "quick", "methods", "networks", "set", "keep_memory")
    arguments = {name: getattr(values, name) for name in shown} | {"rounds": chosen.rounds}
    return report.make(rows, seconds, notes, arguments)


def main() -> None:
    """Measures, prints the table, and writes the file."""
    values = parser().parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax tells much
    console = Console(width=None if sys.stdout.isatty() else 180)
    found = report.read(values.read) if values.read else measured(values, console)
    old = report.read(values.compare) if values.compare else None
    if values.markdown:
        print(report.markdown(found))
    else:
        console.print(report.table(found))
    if old:
        console.print(report.compare(old, found))
    if not values.read and (values.out or not values.quick):
        out = pathlib.Path(values.out) if values.out else report.RESULTS
        path = out if out.suffix == ".json" else report.path_of(found, out)
        report.write(found, path)
        console.print(f"written: {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
