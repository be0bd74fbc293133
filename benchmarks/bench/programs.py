"""Compiled train steps, as a run makes them, on a batch of random numbers."""

import dataclasses
import time
import zlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.bench import measure
from configs import default
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.models import convolution
from ieg_jax.runtime import mesh, watch
from ieg_jax.train import durations, program

RATE = 0.01  # learning rate, constant
EXAMPLES, TRUSTED, CLASSES = 1000, 100, 10  # N, M, K


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the table: its name there, keys, pixels of a side, and the batch that it is measured with."""

    title: str
    keys: dict[str, Any]
    size: int = 32
    batch: int = 64


TINY = Network("tiny", {"model.name": "tiny"}, size=8, batch=16)
SMALL = Network("WRN-10-1", {"model.name": "wide_resnet", "model.depth": 10, "model.width": 1.0})
WRN = Network("WRN-28-2", {"model.name": "wide_resnet", "model.depth": 28, "model.width": 2.0})
RESNET29 = Network("ResNet29", {"model.name": "resnet29_v2"})
RESNET50 = Network("ResNet-50", {"model.name": "resnet50"}, size=224, batch=8)
NETWORKS = {network.title: network for network in (TINY, SMALL, WRN, RESNET29, RESNET50)}


@dataclasses.dataclass
class Step:
    """A compiled step with what it works on, which each call replaces by what it returns.

    Attributes:
      run: the program.
      config: of it, resolved.
      compiled: `run.train_step`.
      compile_seconds: tracing and compiling; little where the program was in the cache.
      batch: random numbers.
      state, window: as the last call left them.
    """

    run: program.Program
    config: Any
    compiled: Any
    compile_seconds: float
    batch: dict[str, jax.Array]
    state: Any = None
    window: Any = None

    def begin(self) -> None:
        """Draws the initial state."""
        self.state, self.window = self.run.init(jax.random.key(0)), self.run.empty_window()

    def __call__(self) -> None:
        """One step."""
        self.state, self.window = self.compiled(self.state, self.window, self.batch, jax.random.key(1))
        jax.block_until_ready((self.state, self.window))

    def sample(self) -> dict[str, float | None]:
        """One sample of a step."""
        return measure.sample(self)

    @property
    def facts(self) -> dict[str, float]:
        """What a row says of it besides its seconds."""
        memory = self.compiled.memory_analysis()
        held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        return {
            "gflop": convolution.flops(self.compiled) / 1e9,
            "passes": self.run.method.passes(self.config),
            # The new state is written over the old one, and must not count twice.
            "mib": (held - memory.alias_size_in_bytes) / 2**20,
            "compile_seconds": self.compile_seconds,
        }


def config_of(method_name: str, network: Network, settings: dict[str, Any], **keys: Any) -> Any:
    """The configuration of a step.

    Args:
      method_name: a method of the registry.
      network: and its batch.
      settings: keys that the user set for all.
      **keys: keys of this step, with `__` for the dot.
    """
    config = default.get_config()
    methods.choose(config, method_name)
    config.schedule.name, config.schedule.base_lr = "constant", RATE
    config.batch_size, config.mesh.data = network.batch, 1
    dotted = {name.replace("__", "."): value for name, value in keys.items()}
    config.update_from_flattened_dict(network.keys | settings | dotted)
    return config_lib.resolve(config)


def build(config: Any, size: int, classes: int = CLASSES, examples: int = EXAMPLES) -> program.Program:
    """The program of a configuration, for colour images of `size` pixels; nothing is compiled yet."""
    image = (size, size, 3)
    shape = program.DataShape(image, image, classes, num_examples=examples, num_ids=examples, num_trusted=TRUSTED)
    return program.build(config, mesh.create(config), shape, durations.in_steps(config, examples))


def step_of(
    method_name: str,
    network: Network,
    settings: dict[str, Any],
    classes: int = CLASSES,
    examples: int = EXAMPLES,
    **keys: Any,
) -> Step:
    """A compiled step, see `config_of`; its state is not drawn yet."""
    config = config_of(method_name, network, settings, **keys)
    began = time.perf_counter()
    run = build(config, network.size, classes, examples)
    # Not `run.compiled_step()`, which is kept as long as the program is.
    compiled = watch.compile_step(run.lowered_step)
    return Step(run, config, compiled, time.perf_counter() - began, random_batch(run, classes, examples))


def random_batch(run: program.Program, classes: int, examples: int) -> dict[str, jax.Array]:
    """Images uniform in [-1, 1], labels and rows uniform over what there is; the same for every method."""

    def drawn(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if np.issubdtype(shape.dtype, np.floating):
            values = rng.uniform(-1, 1, shape.shape)
        elif name.endswith("label"):
            values = rng.integers(0, classes, shape.shape)
        else:
            values = rng.integers(0, min(examples, TRUSTED), shape.shape)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    return {name: drawn(name, shape) for name, shape in run.batch.items()}


def arrays_of(step: Step) -> dict[str, np.ndarray]:
    """The initial weights and the batch of a step, by paths such as `params/head/kernel` and `batch/image`."""
    variables = {"params": step.state.params, "batch_stats": step.state.batch_stats}
    found = flatten_dict(jax.device_get(variables), sep="/")
    return found | {f"batch/{name}": np.asarray(value) for name, value in step.batch.items()}
