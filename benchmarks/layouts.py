"""What parts of a batch (`microbatches`) cost and save: `python -m benchmarks.layouts`.

FLOPs and temporary memory of one compiled train step, WRN-10-1 on 32×32×3, batch 128 in 8 batch groups, one device.
FLOPs are XLA's count, what is in a loop counted as often as the loop runs.
"""

import jax
from rich.console import Console
from rich.table import Table

from configs import default
from ieg_jax.plan import hlo
from ieg_jax.runtime import mesh
from ieg_jax.train import durations, program

SHAPE = program.DataShape((32, 32, 3), (32, 32, 3), 10, num_examples=1000, num_ids=1000, num_trusted=100)


def compiled_step(method_name: str, microbatches: int) -> jax.stages.Compiled:
    """The train step of a method, compiled for one device."""
    config = default.get_config()
    config.method.name, config.microbatches, config.mesh.data = method_name, microbatches, 1
    config.batch_size = config.trusted.batch_size = 128
    config.batch_groups, config.model.convolutions = 8, "lax"  # XLA counts nothing for what it calls
    run = program.build(config, mesh.create(config), SHAPE, durations.in_steps(config, SHAPE.num_examples))
    return run.train_step.lower(run.state, run.window, run.batch, run.rng).compile()


def main() -> None:
    """Compiles and prints one table."""
    table = Table(title="WRN-10-1, 32×32×3, batch 128, float32")
    for heading in ("method", "microbatches", "GFLOP", "× one part", "temporary MiB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method_name in ("supervised", "ieg"):
        whole = None
        for microbatches in (1, 2, 8):
            step = compiled_step(method_name, microbatches)
            flops = step.cost_analysis()["flops"] * hlo.loop_factor(hlo.parse(step.as_text()))
            whole = whole or flops
            memory = step.memory_analysis().temp_size_in_bytes / 2**20
            table.add_row(method_name, str(microbatches), f"{flops / 1e9:.1f}", f"{flops / whole:.2f}", f"{memory:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
