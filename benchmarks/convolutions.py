"""What oneDNN's convolutions gain on this processor: `python -m benchmarks.convolutions [--cases=WRN-28-2,...]`.

The compiled train step of several networks, batch 64 of random images, once with XLA's convolutions
(`model.convolutions=lax`) and once as `auto` chooses. Both take turns in one process, so that what else the machine
does falls on both; the ratio is the median over the rounds. Besides: seconds to compile, and how far the parameters are
from each other after the step, relative to the largest of each array.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.table import Table

from configs import default
from ieg_jax import methods, models
from ieg_jax.methods import base
from ieg_jax.methods.parts import optimizers
from ieg_jax.models import onednn
from ieg_jax.train.step import create_state, train_step

BATCH, CLASSES, FORMS = 64, 10, ("lax", "auto")
WIDE = {"model.name": "wide_resnet"}
CASES = {  # name -> method, side and channels of the images, keys
    "tiny-8x8": ("ieg", 8, 1, {"model.name": "tiny"}),
    "WRN-10-1-8x8": ("ieg", 8, 1, WIDE),
    "WRN-10-1-28x28": ("supervised", 28, 1, WIDE),
    "WRN-28-2": ("supervised", 32, 3, WIDE | {"model.depth": 28, "model.width": 2.0}),
    "WRN-28-2-ieg": ("ieg", 32, 3, WIDE | {"model.depth": 28, "model.width": 2.0}),
}
_CASES = flags.DEFINE_list("cases", list(CASES), "Which ones; the last takes minutes.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Steps of each form.")


def compiled_step(method_name: str, side: int, channels: int, keys: dict):
    """A compiled train step, its arguments, and the seconds that the compiler took."""
    config = default.get_config()
    config.update_from_flattened_dict({"method.name": method_name, "batch_size": BATCH, **keys})
    context = base.Context(
        FrozenConfigDict(config), models.create(config.model, CLASSES), optimizers.create(config.optimizer), CLASSES
    )
    method = methods.get(method_name).bind(context)
    state = create_state(context, method, jax.random.key(0), (side, side, channels), 1)
    rng = np.random.default_rng(0)
    images = {"image": (BATCH,), "views": (BATCH, 1), "probe_image": (BATCH,)}
    data = {k: jnp.asarray(rng.uniform(-1, 1, (*n, side, side, channels)), jnp.float32) for k, n in images.items()}
    labels = ("label", "clean_label", "id", "probe_label")
    data |= {k: jnp.asarray(rng.integers(0, CLASSES, BATCH), jnp.int32) for k in labels}
    step = functools.partial(train_step, context=context, method=method, schedule=optax.constant_schedule(0.01))
    lowered = jax.jit(step).lower(state, data, jax.random.key(0))
    began = time.perf_counter()
    compiled = lowered.compile()
    return functools.partial(compiled, state, data, jax.random.key(0)), time.perf_counter() - began


def difference(one, other) -> float:
    """The largest difference of two trees, each array relative to its largest number."""
    parts = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-12), one, other)
    return float(max(jax.tree.leaves(parts)))


def main(argv: list[str]) -> None:
    """Prints the table, a row at a time."""
    del argv
    console = Console()
    if reason := onednn.missing():
        console.print(f"nothing to compare: {reason}")
        return
    for title in _CASES.value:
        method_name, side, channels, keys = CASES[title]
        steps, compiling, params = {}, {}, {}
        seconds = {form: [] for form in FORMS}
        for form in FORMS:
            steps[form], compiling[form] = compiled_step(
                method_name, side, channels, keys | {"model.convolutions": form}
            )
        for number in range(_ROUNDS.value + 1):
            for form, step in steps.items():
                began = time.perf_counter()
                params[form] = jax.block_until_ready(step())[0].params
                if number:  # the first is for warming up
                    seconds[form].append(time.perf_counter() - began)
        table = Table(title=f"{title} ({method_name}), batch {BATCH}")
        for heading in ("ms, lax", "ms, auto", "lax / auto", "compiled in s, lax", "auto", "parameters differ by"):
            table.add_column(heading, justify="right")
        ratio = np.median([lax / ours for lax, ours in zip(*seconds.values(), strict=True)])
        least = [f"{min(times) * 1e3:.1f}" for times in seconds.values()]
        compiled = [f"{compiling[form]:.0f}" for form in FORMS]
        table.add_row(*least, f"{ratio:.2f}", *compiled, f"{difference(params['auto'], params['lax']):.0e}")
        console.print(table)


if __name__ == "__main__":
    app.run(main)
