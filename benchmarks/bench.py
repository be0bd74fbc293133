"""What a step of each method costs beside a supervised one, and how fast the data come: `make bench`.

FLOPs are XLA's count of the compiled step and the same everywhere. Times are of this machine; the ratios are
measured side by side in one run, round-robin, and the fastest round of each counts.
"""

import functools
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import FrozenConfigDict
from rich.console import Console
from rich.table import Table

from configs import default, quickstart
from ieg_jax import methods, models, optimizers, steps
from ieg_jax.data import pipeline
from ieg_jax.methods import base

LEAST = {"supervised": 3 / 3, "trusted_only": 3 / 3, "l2r": 10 / 3, "ieg": 22 / 3}
ROUNDS = 5


def compiled_step(method_name: str, size: int, width: float, batch: int = 64):
    """A compiled train step of WRN-10-`width` on colour images, its state and a batch of random numbers."""
    config = default.get_config()
    config.method.name, config.batch_size, config.model.width = method_name, batch, width
    network = models.create(config.model, 10)
    context = base.Context(FrozenConfigDict(config), network, optimizers.create(config.optimizer), 10)
    method = base.bind(methods.REGISTRY[method_name], context)
    state = steps.create_state(context, method, jax.random.key(0), (size, size, 3), 1)
    rng = np.random.default_rng(0)
    images = {"image": (batch,), "views": (batch, 1), "probe_image": (batch,)}
    data = {k: jnp.asarray(rng.uniform(-1, 1, (*n, size, size, 3)), jnp.float32) for k, n in images.items()}
    labels = ("label", "clean_label", "probe_label")
    data |= {k: jnp.asarray(rng.integers(0, 10, batch), jnp.int32) for k in labels}
    step = functools.partial(steps.train_step, context=context, method=method, schedule=optax.constant_schedule(0.01))
    run = jax.jit(step).lower(state, data, jax.random.key(0)).compile()
    return run, (state, data, jax.random.key(0))


def bench_steps(console: Console) -> None:
    """FLOPs and times of each method's step."""
    table = Table(title="one train step, WRN-10-2, 32×32×3, batch 64, float32")
    for heading in ("method", "GFLOP", "× supervised", "least possible", "ms", "× supervised"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    programs = {name: compiled_step(name, 32, 2.0) for name in LEAST}
    flops = {name: run.cost_analysis()["flops"] for name, (run, _) in programs.items()}
    seconds = dict.fromkeys(LEAST, float("inf"))
    for round_number in range(ROUNDS + 1):
        for name, (run, arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if round_number:  # the first is for warming up
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    for name in LEAST:
        table.add_row(
            name,
            f"{flops[name] / 1e9:.1f}",
            f"{flops[name] / flops['supervised']:.2f}",
            f"{LEAST[name]:.2f}",
            f"{seconds[name] * 1e3:.0f}",
            f"{seconds[name] / seconds['supervised']:.1f}",
        )
    console.print(table)


def bench_data(console: Console) -> None:
    """Examples a second from the pipeline alone."""
    table = Table(title="data pipeline, digits, batch 64")
    for heading in ("method", "noisy examples/s", "ms per batch"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name in LEAST:
        config = quickstart.get_config(f"method={name}")
        data = pipeline.load(config)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        batches = pipeline.train_batches(config, data, 0, 320, sharding)
        for _ in range(20):
            next(batches)
        began = time.perf_counter()
        count = sum(1 for _ in batches)
        per_batch = (time.perf_counter() - began) / count
        table.add_row(name, f"{config.batch_size / per_batch:,.0f}", f"{per_batch * 1e3:.1f}")
    console.print(table)


if __name__ == "__main__":
    terminal = Console()
    terminal.print(f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}")
    bench_steps(terminal)
    bench_data(terminal)
