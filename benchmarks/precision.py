"""What computing in bfloat16, and computing blocks anew, do to ω and λ: `python -m benchmarks.precision`.

Trains the quickstart (wide ResNet on digits, 80 % noise) for some steps in float32, then takes the same batches and
the same state once in float32, once in bfloat16, and once with `model.remat`, and compares the example weights, the
label trust and the pseudo labels that the method derives from them.
"""

import functools

import jax
import numpy as np
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.table import Table

from configs import quickstart
from ieg_jax import config as config_lib
from ieg_jax import models
from ieg_jax.data.batches import train_batches
from ieg_jax.data.load import load_data
from ieg_jax.methods import base, ieg
from ieg_jax.methods.parts import optimizers
from ieg_jax.runtime import mesh
from ieg_jax.train import durations, program

STEPS = (0, 100, 400)  # updates made before the comparison
BATCHES = 10
VARIANTS = {
    "float32": {},
    "float32, remat": {"model.remat": True},
    "bfloat16": {"model.dtype": "bfloat16"},
}


def supervise_with(config, overrides, num_classes):
    """The jitted `supervise` of ieg for a configuration with other values for some keys."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    network = models.create(config.model, num_classes, config.batch_groups)
    context = base.Context(FrozenConfigDict(config), network, optimizers.create(config.optimizer), num_classes)
    return jax.jit(functools.partial(ieg.supervise, context))


def compare(console: Console) -> None:
    """Trains, compares, and prints one table."""
    config = quickstart.get_config()
    config.mesh.data = 1
    config = config_lib.resolve(config)
    data, shardings = load_data(config), mesh.create(config)
    steps = durations.in_steps(config, len(data.train))
    run = program.build(config, shardings, program.data_shape(config, data), steps)
    streams = run.method.streams
    variants = {name: supervise_with(config, keys, data.num_classes) for name, keys in VARIANTS.items()}
    table = Table(
        title=f"{BATCHES} batches of {config.batch_size}, {config.model.name} on digits, against float32",
        caption="λ changed: share of examples; ω: Σ|ω − ω₃₂|, of at most 2, and correlation; g: largest difference",
    )
    for heading in ("after steps", "computed in", "λ changed", "ω moved", "ω correlation", "pseudo label"):
        table.add_column(heading, justify="left" if heading == "computed in" else "right")
    state, window, rng = run.init(jax.random.key(0)), run.empty_window(), jax.random.key(1)
    batches = train_batches(config, data, streams, 0, STEPS[-1] + 1, shardings.batch)
    for step, batch in enumerate(batches):
        if step in STEPS:
            seen = list(train_batches(config, data, streams, step, step + BATCHES, shardings.batch))
            found = {name: [run_one(state, b, rng) for b in seen] for name, run_one in variants.items()}
            for name in list(VARIANTS)[1:]:
                table.add_row(str(step), name, *differences(found["float32"], found[name]))
        state, window = run.train_step(state, window, batch, rng)
        if (step + 1) % steps.log_every == 0:
            window = run.empty_window()
    console.print(table)


def differences(one: list[base.Supervision], other: list[base.Supervision]) -> list[str]:
    """Columns of the table: λ changed, ω moved, their correlation, pseudo labels."""

    def column(name):
        return [np.stack([np.asarray(getattr(s, name), np.float64) for s in side]) for side in (one, other)]

    trust, other_trust = column("label_trust")
    weights, other_weights = column("example_weights")
    pseudo, other_pseudo = column("pseudo_label")
    return [
        f"{np.mean(trust != other_trust):.2%}",
        f"{np.abs(weights - other_weights).sum(1).mean():.4f}",
        f"{np.corrcoef(weights.ravel(), other_weights.ravel())[0, 1]:.5f}",
        f"{np.abs(pseudo - other_pseudo).max():.1e}",
    ]


if __name__ == "__main__":
    compare(Console())
