"""Compiling the train step ahead of time, for a TPU slice that is not here, and what the compiled program needs.

The TPU compiler is part of the package libtpu and runs on any Linux machine. What it found out is kept in the user's
cache folder, because it takes minutes for a large network: `requests/` leads from a configuration to a program without
tracing it anew, `programs/` from a program to what the compiler said of it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

import ieg_jax
from ieg_jax import config as config_lib
from ieg_jax import hlo, models, program, sharding, train
from ieg_jax.data import pipeline
from ieg_jax.data.images import cache_folder
from ieg_jax.errors import UserError, check_choice
from ieg_jax.hardware import TPUS, Chip

FORMAT = 1  # of the cached files; to be raised when what they hold changes its meaning

# What is offered for rent; the compiler takes other shapes too.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES, (8, 8, 16), (8, 16, 16)), "v6e": _FLAT}

# (H, W, C) as loaded, None = each image has a size of its own; K; training examples, as published.
_DATA = {
    "digits": ((8, 8, 1), 10, 1_297),
    "fashion_mnist": ((28, 28, 1), 10, 60_000),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "cifar100": ((32, 32, 3), 100, 50_000),
    "webvision/mini": (None, 50, 65_944),
    "webvision/google": (None, 1000, 980_449),
    "webvision/full": (None, 1000, 2_439_574),
    "imagenet": (None, 1000, 1_281_167),
    "food101": (None, 101, 75_750),
    "controlled_noisy_web_labels": (None, 100, 50_000),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: its chip, the shape in which its chips are joined, and jax's devices, one for each chip."""

    name: str
    chip: Chip
    devices: Sequence[jax.Device]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one program; numbers are of one device and one step.

    Attributes:
      memory: bytes of HBM: `arguments`, `outputs` that take no argument's place, `temporary`, `code`; empty where the
        program does not fit.
      refused: the first line of the compiler's refusal, "" where the program fits.
      needed: bytes of HBM that it needs in all; 0 where it does not fit and the compiler does not say.
      flops: XLA's count, loop bodies as often as they run.
      xla_bytes: XLA's count of the bytes that instructions read and write, wherever they lie; loop bodies count once.
      xla_seconds: XLA's `optimal_seconds`, sane for small programs only.
      traffic: bytes read from and written to HBM, see `hlo.memory_traffic`.
      collectives: see `hlo.Collective`; dicts with kind, name, arrays (text), count, group, bytes, sent_bytes, source.
      unknown_loops: loops that are counted as if they ran once.
      compile_seconds: on this machine.
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
    """A train step of a configuration on a slice.

    Attributes:
      config: with everything resolved.
      num_chips: that the mesh has.
      arguments: bytes of one device's part of each argument, see `argument_bytes`.
      forward_flops: of one forward pass of the whole batch, over all chips, by XLA's count before compilation.
      seconds: of tracing and lowering, on this machine.
      compiled: what the compiler said.
    """

    config: ConfigDict
    num_chips: int
    arguments: dict[str, int]
    forward_flops: float
    seconds: dict[str, float]
    compiled: Compiled


def open_slice(topology: str) -> Slice:
    """Describes the slice `chip:shape`, e.g. `v5e:4x4` or `v5p:2x2x4`, with jax's devices to compile for.

    Raises:
      UserError: for a chip or shape that is not offered; the message lists those that are.
    """
    name, _, text = topology.partition(":")
    check_choice(f"--topology={topology}: unknown chip", name, TPUS)
    shapes = {"x".join(map(str, shape)): shape for shape in SHAPES[name]}
    if text not in shapes:
        raise UserError(f"--topology={topology}: {name} comes in slices of {', '.join(shapes)} chips")
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # a v4 chip's two cores work as one device, as they do on Cloud TPU
    if math.prod(shapes[text]) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:
        raise UserError(f"--topology={topology}: libtpu cannot describe it: {str(error).splitlines()[0]}") from None
    return Slice(topology, TPUS[name], devices)


def data_shape(config: ConfigDict) -> program.DataShape:
    """The shapes of the data that the configuration names: of a known data set from a table, else by loading them.

    The number of training examples is that before damaged ones are left out; it only sets how long an epoch is.
    """
    name = config.data.name
    known = f"webvision/{config.data.variant or 'mini'}" if name == "webvision" else name
    if known not in _DATA:
        return train.data_shape(config, pipeline.load(config))
    size, num_classes, num_examples = _DATA[known]
    if config.data.image_size:
        size = (config.data.image_size, config.data.image_size, size[2] if size else 3)
    num_trusted = 0
    if config.trusted.source == "train":
        fraction = config.trusted.fraction
        num_trusted = round(fraction * num_examples) if fraction else config.trusted.per_class * num_classes
    return program.DataShape(
        image=pipeline.image_shape(config, "standard", size),
        evaluation_image=pipeline.image_shape(config, "evaluation", size),
        num_classes=config.data.num_classes or num_classes,
        num_examples=max(1, num_examples - num_trusted - config.data.validation_size),
        num_ids=num_examples,
    )


def check_divisible(config: ConfigDict, num_chips: int) -> None:
    """Raises UserError where the chips do not divide a batch; the message has flags that work, nearest to the old."""
    if config.mesh.data != -1:
        num_chips = config.mesh.data * config.mesh.fsdp
    units = {
        "batch_size": math.lcm(num_chips, config.batch_groups),
        "trusted.batch_size": math.lcm(num_chips, config.batch_groups),
        "eval_batch_size": num_chips,
    }
    wrong, flags = [], []
    for key, unit in units.items():
        value = _get(config, key)
        if value and value % unit:
            wrong.append(f"{key}={value}")
            flags.append(f"--config.{key}={max(1, round(value / unit)) * unit}")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: no multiple of {num_chips} chips"
            + (f" and {config.batch_groups} batch groups" if config.batch_groups > 1 else "")
            + f"; use for instance {' '.join(flags)}"
        )


def step(config: ConfigDict, slice_: Slice, tell: Callable[[str], None] = lambda text: None) -> Step:
    """Compiles the train step of a configuration for a slice, or finds the result in the cache.

    Args:
      config: the configuration.
      slice_: from `open_slice`.
      tell: is told what is about to take long.

    Raises:
      UserError: for a configuration that cannot be used with this slice.
    """
    config = ConfigDict(config.copy_and_resolve_references())
    check_divisible(config, len(slice_.devices))
    config_lib.validate(config)
    config.trusted.batch_size = config.trusted.batch_size or config.batch_size
    layout = sharding.create(config, slice_.devices)
    shape = data_shape(config)
    request_file = _file("requests", config.to_json(sort_keys=True), str(shape), slice_.name, _sources_digest())
    request = _read(request_file)
    if request:
        compiled = _read(_folder("programs") / f"{request['program']}.json")
        if compiled:
            return Step(
                config, layout.num_devices, request["arguments"], request["forward_flops"], request["seconds"],
                Compiled(**compiled),
            )  # fmt: skip

    tell("tracing the step")
    plan = train.make_plan(config, types.SimpleNamespace(train=range(shape.num_examples)))
    run = program.build(config, layout, shape, plan.first_cycle, plan.num_steps, plan.log_every)
    began = time.monotonic()
    traced = run.train_step.trace(run.state, run.window, run.batch, run.rng)
    traced_at = time.monotonic()
    lowered = traced.lower()
    seconds = {"trace": traced_at - began, "lower": time.monotonic() - traced_at}
    program_file = _file("programs", lowered.as_text(), slice_.name)
    compiled = _read(program_file)
    if not compiled:
        tell("compiling it: minutes for a large network, longer where memory is short")
        compiled = dataclasses.asdict(compile_program(lowered))
        _write(program_file, compiled)
    request = {
        "program": program_file.stem,
        "arguments": argument_bytes(run),
        "forward_flops": _forward_flops(config, shape, run.state),
        "seconds": seconds,
    }
    _write(request_file, request)
    return Step(
        config, layout.num_devices, request["arguments"], request["forward_flops"], seconds, Compiled(**compiled)
    )


def compile_program(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles a lowered program and asks the compiler about it; one that does not fit is an answer too."""
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
    """Gathers what is to be known of a compiled program from XLA's analyses and its text."""
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
    """The HBM that a refused program needs, in bytes, from the compiler's message; 0 where it does not say."""
    for pattern in (
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)",
        r"requirement ([\d.]+)([KMGT])",
    ):
        if match := re.search(pattern, message):
            return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])
    return 0


def argument_bytes(run: program.Program) -> dict[str, int]:
    """Bytes of one device's part of what a step takes, without padding: the state in its parts, window and batch."""
    state = run.state
    parts = {
        "parameters": state.params,
        "average of parameters": state.ema_params,
        "optimiser state": state.opt_state,
        "batch statistics": state.batch_stats,
        "method's memory": state.method_state,
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
    """The forward passes of a batch that a step must cost at least, a backward pass counting as two; None = not known.

    With v = V − 1 strong views and r = trusted batch / batch, an ieg step has 1 + v + (2 + v) forward passes (views
    and mixup pool), 2 for the lookahead's gradient, 3 r for the trusted loss and its gradient, 2 for the tangent of the
    lookahead, and 2 (1 + v + 2 + v) for the last gradient: 13 + 6 v + 3 r, which is 22 for the usual v = r = 1.
    """
    views, ratio = config.augment.num_views - 1, config.trusted.batch_size / config.batch_size
    if config.meta.layers != ".*" or config.meta.pseudo_label_gradient:
        return None
    return {"ieg": 13 + 6 * views + 3 * ratio, "l2r": 7 + 3 * ratio, "supervised": 3.0, "trusted_only": 3.0}.get(
        config.method.name
    )


def _forward_flops(config: ConfigDict, shape: program.DataShape, state: Any) -> float:
    network = models.create(config.model, shape.num_classes, config.batch_groups)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    images = jax.ShapeDtypeStruct((config.batch_size, *shape.image), jnp.float32)

    def forward(variables, images):
        return network.apply(variables, images, train=True, mutable=["batch_stats"])

    return (jax.jit(forward).lower(variables, images).cost_analysis() or {}).get("flops", 0.0)


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def versions() -> dict[str, str]:
    """The versions that a result depends on; "" for a package that is not installed."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def _sources_digest() -> str:
    """A hash of the package's code that makes programs: where it changed, a program must be traced anew."""
    root = pathlib.Path(ieg_jax.__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root / "models", root / "methods"):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _folder(kind: str) -> pathlib.Path:
    return cache_folder() / "plan" / kind


def _file(kind: str, *key: str) -> pathlib.Path:
    """The cached file of a key; versions and the flags of the compiler are part of every key."""
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    everything = json.dumps([FORMAT, versions(), flags, *key], sort_keys=True)
    return _folder(kind) / f"{hashlib.sha256(everything.encode()).hexdigest()[:32]}.json"


def _read(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(file: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a cached file; where that is not possible the result is not kept."""
    partial = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
