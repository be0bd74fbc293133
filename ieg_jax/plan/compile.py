"""Compiles the train step for a TPU slice that is not here, and asks the compiler what the program needs.

The TPU compiler is part of the package libtpu and runs on any Linux machine. It takes minutes for a large network, so
its answers are kept in the user's cache folder, in two parts. A file in `requests/` says which program a configuration
leads to, so that the step need not be traced again. A file in `programs/` has what the compiler said of a program.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax import files, methods, models
from ieg_jax.data import published
from ieg_jax.data.batches import image_shape
from ieg_jax.data.images import cache_folder
from ieg_jax.data.load import load_data
from ieg_jax.errors import StorageError, UserError, check_choice
from ieg_jax.hardware import TPUS, Chip
from ieg_jax.plan import hlo
from ieg_jax.runtime import mesh
from ieg_jax.train import check, durations, program

# The packages whose code can change what is compiled. If it changes, the step is traced again.
PROGRAM_CODE = ("train", "methods", "models", "runtime", "plan", "data")
FORMAT = 1  # of the cached files; it must be raised when their contents change their meaning

# The shapes of slices that are offered for rent. The compiler would take others too.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES, (8, 8, 16), (8, 16, 16)), "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      name: the chip and the shape in which chips are joined, such as v5e:4x4.
      chip: what one of its chips can do.
      devices: jax's devices, one for each chip.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]

    @property
    def num_hosts(self) -> int:
        """How many hosts its chips are attached to."""
        return len({device.process_index for device in self.devices})


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one program. Numbers are those of one device and one step.

    Attributes:
      memory: bytes of HBM for `arguments`, for `outputs` that take no argument's place, for `temporary` arrays and for
        the `code`; empty where the program does not fit.
      refused: the first line of the compiler's refusal, "" where the program fits.
      needed: bytes of HBM that the program needs in all; 0 where it does not fit and the compiler does not say.
      flops: XLA's count of operations, with loop bodies counted as often as they run.
      xla_bytes: XLA's count of the bytes that instructions read and write, in HBM or on the chip; it counts loop bodies
        once.
      xla_seconds: XLA's `optimal_seconds`; it makes sense for small programs only.
      traffic: bytes read from and written to HBM, see `hlo.memory_traffic`.
      collectives: dicts with the attributes and properties of `hlo.Collective`; their arrays are texts.
      unknown_loops: names of the loops that are counted as if they ran once.
      compile_seconds: seconds that compiling took on this machine.
    """

    memory: dict[str, int]
    refused: str
    needed: int
    flops: float
    xla_bytes: float
    xla_seconds: float
    traffic: int
    collectives: list[dict[str, Any]]
    unknown_loops: list[str]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Step:
    """The train step of a configuration on a slice.

    Attributes:
      config: the configuration, in which everything is resolved.
      num_chips: how many chips the mesh has.
      arguments: bytes of one device's part of each argument, see `argument_bytes`.
      forward_flops: operations of a forward pass of the whole batch on all chips, by XLA's count before compilation.
      seconds: seconds for `trace` and `lower` on this machine.
      compiled: what the compiler said.
    """

    config: ConfigDict
    num_chips: int
    arguments: dict[str, int]
    forward_flops: float
    seconds: dict[str, float]
    compiled: Compiled


def open_slice(topology: str) -> Slice:
    """Returns the slice `chip:shape`, such as `v5e:4x4` or `v5p:2x2x4`, with jax's devices to compile for.

    Raises:
      UserError: for a chip or shape that is not offered; the message lists those that are.
    """
    name, _, text = topology.partition(":")
    check_choice(f"--topology={topology}: unknown chip", name, SHAPES)
    shapes = {"x".join(map(str, shape)): shape for shape in SHAPES[name]}
    if text not in shapes:
        raise UserError(f"--topology={topology}: {name} comes in slices of {', '.join(shapes)} chips")
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a v4 chip are one device, as on Cloud TPU
    if math.prod(shapes[text]) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:
        raise UserError(f"--topology={topology}: libtpu cannot describe it: {str(error).splitlines()[0]}") from None
    return Slice(topology, TPUS[name], devices)


def data_shape(config: ConfigDict) -> tuple[ConfigDict, program.DataShape]:
    """Returns the configuration with everything that follows from the data, and the shapes of the data.

    The shapes of published data sets are known. Other data are loaded. The number of a published set's training
    examples includes those that a run may leave out as damaged; it only sets the length of an epoch.
    """
    known = published.find(config.data)
    if known is None:
        data = load_data(config)
        config = config_lib.resolve(config, data.facts)
        return config, program.data_shape(config, data)
    num_trusted = 0
    if config.trusted.source == "train":
        fraction = config.trusted.fraction
        num_trusted = round(fraction * known.num_train) if fraction else config.trusted.per_class * known.num_classes
    num_examples = known.num_train - num_trusted - config.data.validation_size
    num_examples = min(num_examples, config.data.train_size or num_examples)
    if config.data.folds:
        num_examples = round(num_examples * (1 - 1 / config.data.folds))
    num_examples = max(1, num_examples)
    side = None if known.image is None else min(known.image[:2])
    config = config_lib.resolve(config, config_lib.Facts(num_examples, config.data.image_size, side))
    return config, program.DataShape(
        image=image_shape(config, "standard", known.image),
        evaluation_image=image_shape(config, "evaluation", known.image),
        num_classes=config.data.num_classes or known.num_classes,
        num_examples=num_examples,
        num_ids=known.num_train,
        num_trusted=max(1, num_trusted),
        transfer=config.data.transfer,
    )


def check_divisible(config: ConfigDict, num_chips: int) -> None:
    """Raises UserError where the chips do not divide a batch. The message has the nearest values that they divide."""
    if config.mesh.data != -1:
        num_chips = config.mesh.data * config.mesh.fsdp
    units = {
        "batch_size": math.lcm(num_chips, config.batch_groups),
        "trusted.batch_size": math.lcm(num_chips, config.batch_groups),
        "eval_batch_size": num_chips,
    }
    wrong, flags = [], []
    for key, unit in units.items():
        value = config_lib.get(config, key)
        if value and value % unit:
            wrong.append(f"{key}={value}")
            flags.append(f"--config.{key}={max(1, round(value / unit)) * unit}")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: no multiple of {num_chips} chips"
            + (f" and {config.batch_groups} batch groups" if config.batch_groups > 1 else "")
            + f"; use for instance {' '.join(flags)}"
        )


def compile_step(config: ConfigDict, slice_: Slice, tell: Callable[[str], None] = lambda text: None) -> Step:
    """Compiles the train step of a configuration for a slice, or finds the result in the cache.

    Args:
      config: the configuration.
      slice_: from `open_slice`.
      tell: is called with a text before anything that takes long.

    Raises:
      UserError: for a configuration that cannot be used with this slice.
    """
    check_divisible(config, len(slice_.devices))
    config = config_lib.resolve(config)
    check.validate(config)
    config.model.convolutions = "lax"  # this processor's are not those of the slice
    shardings = mesh.create(config, slice_.devices)
    config, shape = data_shape(config)
    request_file = _file("requests", config.to_json(sort_keys=True), str(shape), slice_.name, _sources_digest())
    request = _read(request_file)
    if request:
        compiled = _read(_folder("programs") / f"{request['program']}.json")
        if compiled:
            return Step(
                config, shardings.num_devices, request["arguments"], request["forward_flops"], request["seconds"],
                Compiled(**compiled),
            )  # fmt: skip

    tell("tracing the step")
    steps = durations.in_steps(config, shape.num_examples)
    run = program.build(config, shardings, shape, steps)
    began = time.monotonic()
    traced = run.train_step.trace(run.state, run.window, run.batch, run.rng)
    traced_at = time.monotonic()
    lowered = traced.lower()
    seconds = {"trace": traced_at - began, "lower": time.monotonic() - traced_at}
    program_file = _file("programs", lowered.as_text(), slice_.name)
    compiled = _read(program_file)
    if not compiled:
        tell("compiling it: minutes for a large network, longer where this machine has little memory")
        compiled = dataclasses.asdict(compile_program(lowered))
        _write(program_file, compiled)
    request = {
        "program": program_file.stem,
        "arguments": argument_bytes(run),
        "forward_flops": _forward_flops(config, shape, run.one_network),
        "seconds": seconds,
    }
    _write(request_file, request)
    return Step(
        config, shardings.num_devices, request["arguments"], request["forward_flops"], seconds, Compiled(**compiled)
    )


def compile_program(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles a lowered program, and returns what the compiler said; it may be that the program does not fit."""
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = str(error).strip().splitlines()[0]
        needed = refusal_bytes(str(error))
        return Compiled({}, refused, needed, 0.0, 0.0, 0.0, 0, [], [], time.monotonic() - began)
    return describe(
        compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text(), time.monotonic() - began
    )


def describe(memory: Any, cost: Mapping[str, float], text: str, compile_seconds: float) -> Compiled:
    """Gathers what XLA's analyses and the program's text say about a compiled program.

    Args:
      memory: from `jax.stages.Compiled.memory_analysis`.
      cost: from `jax.stages.Compiled.cost_analysis`.
      text: from `jax.stages.Compiled.as_text`.
      compile_seconds: seconds that compiling took.
    """
    module = hlo.parse(text)
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    collectives = [
        {
            "kind": one.kind,
            "name": one.name,
            "arrays": [str(array) for array in one.arrays],
            "count": one.count,
            "group": one.group,
            "bytes": one.bytes,
            "sent_bytes": one.sent_bytes,
            "source": one.source,
        }
        for one in hlo.find_collectives(module)
    ]
    return Compiled(
        memory=parts,
        refused="",
        needed=sum(parts.values()),
        flops=cost.get("flops", 0.0) * hlo.loop_factor(module),
        xla_bytes=cost.get("bytes accessed", 0.0),
        xla_seconds=cost.get("optimal_seconds", 0.0),
        traffic=hlo.memory_traffic(module),
        collectives=collectives,
        unknown_loops=module.unknown_loops,
        compile_seconds=compile_seconds,
    )


def refusal_bytes(message: str) -> int:
    """Reads from the compiler's message how many bytes of HBM a refused program needs; 0 where it does not say."""
    for pattern in (
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)",
        r"requirement ([\d.]+)([KMGT])",
    ):
        if match := re.search(pattern, message):
            return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])
    return 0


def argument_bytes(run: program.Program) -> dict[str, int]:
    """Returns the bytes of one device's part of each argument of a step, without padding.

    The state is divided into its parts. Beside it are the window of metrics and the batch.
    """
    state = run.state
    parts = {
        "parameters": state.params,
        "average of parameters": state.ema_params,
        "optimiser state": state.opt_state,
        "batch statistics": state.batch_stats,
        "memory of the method": (state.method, state.rows),
        "sums of ω and λ": state.examples,
        "window of metrics": run.window,
        "batch": run.batch,
    }
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )
        for name, tree in parts.items()
    }


def least_forward_passes(config: ConfigDict) -> float | None:
    """Returns how many forward passes of a batch a step must cost at least, where a backward pass counts as two.

    It returns None where this is not known: where the lookahead moves only some layers, or where its gradient also
      flows
    through the pseudo labels.
    """
    if config.meta.layers != ".*" or config.meta.pseudo_label_gradient:
        return None
    return methods.get(config.method.name).passes(config)


def _forward_flops(config: ConfigDict, shape: program.DataShape, variables: Any) -> float:
    """Returns the operations of a forward pass of a whole batch, as XLA counts them before it optimises."""
    network = models.create(config.model, shape.num_classes, config.batch_groups)
    images = jax.ShapeDtypeStruct((config.batch_size, *shape.image), jnp.float32)

    def forward(variables, images):
        return network.apply(variables, images, train=True, mutable=["batch_stats"])

    return (jax.jit(forward).lower(variables, images).cost_analysis() or {}).get("flops", 0.0)


def versions() -> dict[str, str]:
    """Returns the versions of the packages on which a result depends; "" for one that is not installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _sources_digest() -> str:
    """Returns a hash of the code in PROGRAM_CODE."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in PROGRAM_CODE:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _folder(kind: str) -> pathlib.Path:
    """Returns the folder of cached `requests` or `programs`."""
    return cache_folder() / "plan" / kind


def _file(kind: str, *key: str) -> pathlib.Path:
    """Returns the cached file of a key. Versions and the flags of the compiler are part of every key."""
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    everything = json.dumps([FORMAT, versions(), flags, *key], sort_keys=True)
    return _folder(kind) / f"{hashlib.sha256(everything.encode()).hexdigest()[:32]}.json"


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    """Reads a cached file; returns None where it does not exist or cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(file: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a cached file. Where that is not possible, the result is simply not kept."""
    with contextlib.suppress(OSError, StorageError):
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(file, content)
