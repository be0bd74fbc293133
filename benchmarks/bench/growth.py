"""What a step costs as batch, classes, views, devices and examples grow."""

import dataclasses
import gc

from benchmarks.bench import children, measure, programs
from benchmarks.bench.options import Options
from benchmarks.bench.steps import Rows

BATCHES, CLASSES, VIEWS = (32, 64, 128, 256), (10, 100, 1000), (2, 3, 5)
EXAMPLES = (10_000, 100_000, 1_000_000, 10_000_000)


def measure_growth(options: Options) -> tuple[Rows, list[str]]:
    """Rows `growth/<what>/<value>`, each a multiple of that of its first value.

    A step of `ieg` on WRN-10-1 by batch, K and views; a step of `elr`, which remembers K numbers of each example, by N;
    simulated devices; and what else grows with N.
    """
    base = programs.TINY if options.quick else programs.SMALL
    cases = {
        "batch, ieg": {n: ("ieg", dataclasses.replace(base, batch=n), {}) for n in BATCHES},
        "K, ieg": {k: ("ieg", base, {"classes": k}) for k in CLASSES},
        "views, ieg": {v: ("ieg", base, {"augment__num_views": v}) for v in VIEWS},
        "N, elr": {n: ("elr", base, {"examples": n}) for n in EXAMPLES},
    }
    rows, kept = {}, {}
    for what, values in list(cases.items())[: 1 if options.quick else None]:
        for value, (method, network, keys) in list(values.items())[: 2 if options.quick else None]:
            # Batch 64, 10 classes and two views are one program, which is measured once.
            usual = keys in ({}, {"classes": 10}, {"augment__num_views": 2}) and network.batch == base.batch
            if not (usual and base.title in kept):
                options.say(f"growth: {what}, {value:,}")
                step = programs.step_of(method, network, options.settings, **keys)
                step.begin()
                taken = measure.interleaved({what: step.sample}, options.few)[what]
                found = measure.row(taken, network=network.title, **step.facts)
                del step
                gc.collect()
                if usual:
                    kept[base.title] = found
            row = kept[base.title] if usual else found
            rows[f"growth/{what}/{value:,}"] = row | {"base": f"growth/{what}/{next(iter(values)):,}"}
    if not options.quick:
        rows |= children.measure_devices(options)
    return rows | children.measure_examples(options), []
