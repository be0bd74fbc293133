"""What a compiled program does, read from the text that XLA prints of it: collectives, loops, memory traffic.

XLA's own cost analysis counts the body of a loop once and says nothing about collectives. Here every instruction is
counted as often as it runs. The text is that of `jax.stages.Compiled.as_text()`; the grammar is XLA's HLO.
"""

import collections
import dataclasses
import functools
import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([\d,]*)(:[^{}]*)?\})?")
_REFERENCE = re.compile(r"%([\w.\-]+)")
# They name memory, or wait for what another instruction moves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional", "opt-barrier", "domain", "add-dependency", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array: dtype and shape as XLA names them, and where and how it lies.

    Attributes:
      dtype: e.g. `f32`.
      shape: sizes of the axes.
      on_chip: whether it lies in a memory other than the main one (HBM): on a TPU in its vector or scalar memory.
      padded: elements with the padding.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False
    padded: int = 0

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return math.ceil(math.prod(self.shape) * _BITS.get(self.dtype, 0) / 8)

    @property
    def padded_bytes(self) -> int:
        """Size with the padding that the tiles of its layout need."""
        return math.ceil(self.padded * _BITS.get(self.dtype, 0) / 8)

    @property
    def hbm_bytes(self) -> int:
        """What it takes in main memory, padding included; 0 for an array on the chip."""
        return 0 if self.on_chip else self.padded_bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays opcode(operands), attributes`; a tuple's arrays are listed flat."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # what stands in the brackets, such as the number of a parameter
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, each a list of instructions in the order in which they run."""

    computations: dict[str, list[Instruction]]
    entry: str
    num_partitions: int = 1

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program.

        Of a conditional every branch is counted as taken; a loop whose count XLA does not know (see `unknown_loops`)
        as running once.
        """
        return _count_runs(self, loops=True)

    @functools.cached_property
    def unknown_loops(self) -> list[str]:
        """The loops that run and whose count XLA does not know."""
        return [
            instruction.name
            for name, computation in self.computations.items()
            for instruction in computation
            if instruction.opcode == "while" and self.runs.get(name) and trip_count(instruction, self) is None
        ]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
      kind: one of KINDS.
      name: of the instruction.
      arrays: what it works on, of one device: the results, for a reduce-scatter the operands.
      count: how often it runs.
      group: devices that take part together.
      source: the operation of the model that it comes from, as jax names it; that of one array where XLA joined many.
    """

    kind: str
    name: str
    arrays: tuple[Array, ...]
    count: int
    group: int
    source: str

    @property
    def bytes(self) -> int:
        """Size of the arrays, all runs together."""
        return self.count * sum(array.bytes for array in self.arrays)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device must send at least, all runs together, by the usual ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes


def parse(text: str) -> Module:
    """Parses the text of an HLO module.

    Raises:
      ValueError: where it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n") + 1])
    entry, current = "", None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction:
                current.append(instruction)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def parse_instruction(line: str) -> Instruction | None:
    """Parses one line of a computation; None for one that is no instruction."""
    name = _NAME.match(line)
    if not name:
        return None
    rest = line[name.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    arrays = parse_arrays(rest[: end + 1])
    opcode, _, arguments = rest[end + 1 :].strip().partition("(")
    close = _closing(f"({arguments}", 0) - 1
    literal = arguments[:close]
    operands = tuple(_REFERENCE.findall(literal))
    return Instruction(name[2], opcode, arrays, operands, literal, arguments[close + 1 :], bool(name[1]))


def parse_arrays(text: str) -> tuple[Array, ...]:
    """The arrays in the text of a type, `f32[8,3]{1,0:T(8,128)S(1)}` or a tuple of such; tokens are left out."""
    return tuple(
        _array(dtype, sizes, order, layout) for dtype, sizes, order, layout in _ARRAY.findall(text) if dtype in _BITS
    )


def trip_count(loop: Instruction, module: Module) -> int | None:
    """How often a `while` runs its body; None where that cannot be seen.

    XLA writes it down where it knows it. Otherwise it is read from a condition that compares a counter with a
    constant, taken to start at 0 and to rise by 1, as jax's loops do.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations.get(_attribute(loop, "condition"), [])
    constants = {step.name: step.literal for step in condition if step.opcode == "constant"}
    for step in condition:
        if step.root and step.opcode == "compare" and "direction=LT" in step.attributes:
            bound = constants.get(step.operands[-1], "")
            return int(bound) if bound.isdigit() else None
    return None


def find_collectives(module: Module) -> list[Collective]:
    """The collectives that run, those that move most first.

    One that is split into a start and a done part, or spread by XLA over several fusions so that it runs beside other
    work, is one: its parts have one channel.
    """
    found: dict[tuple[str, str], Collective] = {}
    for name, computation in module.computations.items():
        runs = module.runs.get(name, 0)
        if not runs:
            continue
        types = {instruction.name: instruction.arrays for instruction in computation}
        for instruction in computation:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a TPU's fusion of an all-reduce with the slice that is kept of it
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = (kind, channel[1] if channel else f"{name}/{instruction.name}")
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            collective = Collective(
                kind=kind,
                name=instruction.name,
                arrays=_moved(kind, instruction, types),
                count=runs,
                group=_group_size(instruction.attributes, module),
                source=source[1] if source else "",
            )
            if key not in found or collective.bytes > found[key].bytes:
                found[key] = collective
    return sorted(found.values(), key=lambda collective: -collective.sent_bytes)


def memory_traffic(module: Module) -> int:
    """Bytes that a run reads from and writes to main memory (HBM), padding included.

    Each instruction outside fusions reads its operands once and writes its results once, those on the chip excepted;
    of arrays that are only sliced or updated in place, the slice counts. What a program needs in truth can be a little
    more, where a convolution reads an image several times.
    """
    total = 0
    for name in _run_by_control_flow(module):
        types = {instruction.name: instruction for instruction in module.computations[name]}
        per_run = sum(_traffic(instruction, types, module) for instruction in module.computations[name])
        total += per_run * module.runs.get(name, 0)
    return total


def loop_factor(module: Module) -> float:
    """FLOPs of the convolutions and matrix products, over what they are when each loop body is counted once.

    By this XLA's count of a program's FLOPs, which does the latter, is to be multiplied. 1 without loops.
    """
    total = once = 0
    runs_once = _count_runs(module, loops=False)
    for name, computation in module.computations.items():
        if runs := module.runs.get(name, 0):
            types = {instruction.name: instruction.arrays for instruction in computation}
            flops = sum(_product_flops(instruction, types) for instruction in computation)
            total, once = total + flops * runs, once + flops * runs_once[name]
    return total / once if once else 1.0


def _array(dtype: str, sizes: str, order: str, layout: str) -> Array:
    shape = tuple(int(size.replace("<=", "")) for size in sizes.split(",") if size.strip())
    padded = list(shape)
    tile = re.search(r"T\(([\d,]+)\)", layout or "")
    if tile and order:
        # The tile lies over the axes that are minor in memory, its last number on the most minor one.
        minor_to_major = [int(axis) for axis in order.split(",")]
        for axis, size in zip(minor_to_major, reversed([int(size) for size in tile[1].split(",")]), strict=False):
            padded[axis] = math.ceil(padded[axis] / size) * size
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, shape, bool(space) and int(space[1]) > 0, math.prod(padded))


def _closing(text: str, start: int) -> int:
    """Place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _attribute(instruction: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _callees(instruction: Instruction, module: Module) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often. Those that add two numbers are not among them."""
    opcode = instruction.opcode
    if opcode == "while":
        times = trip_count(instruction, module) or 1
        return [(_attribute(instruction, "body"), times), (_attribute(instruction, "condition"), times + 1)]
    if opcode == "call":
        return [(_attribute(instruction, "to_apply"), 1)]
    if opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = _REFERENCE.findall(branches[1]) if branches else []
        names += [_attribute(instruction, f"{value}_computation") for value in ("true", "false")]
        return [(name, 1) for name in names if name]
    if opcode in ("fusion", "async-start"):
        return [(_attribute(instruction, "calls"), 1)]
    return []


def _run_by_control_flow(module: Module) -> list[str]:
    """Computations whose instructions run one after the other: all but the insides of fusions and the like."""
    names, queue = [], [module.entry]
    while queue:
        name = queue.pop()
        if name in names or name not in module.computations:
            continue
        names.append(name)
        for instruction in module.computations[name]:
            if instruction.opcode in ("while", "call", "conditional"):
                queue += [callee for callee, _ in _callees(instruction, module)]
    return names


def _count_runs(module: Module, loops: bool) -> dict[str, int]:
    """How often each computation runs; with `loops` false, as if each loop ran its body once."""
    counts: dict[str, int] = collections.Counter({module.entry: 1})
    # Callees stand before their callers in the text, so the counts of all callers are complete when one is reached.
    for name in reversed(module.computations):
        for instruction in module.computations[name]:
            for callee, times in _callees(instruction, module):
                counts[callee] += counts[name] * (times if loops or instruction.opcode != "while" else 1)
    return dict(counts)


def _moved(kind: str, instruction: Instruction, types: dict[str, tuple[Array, ...]]) -> tuple[Array, ...]:
    """The arrays that a collective works on."""
    operands = tuple(array for name in instruction.operands for array in types.get(name, ()))
    if kind == "reduce-scatter" and operands:
        return operands
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, flags): as many results as operands.
        half = len(operands) or 1
        return instruction.arrays[half : 2 * half]
    return instruction.arrays


def _group_size(attributes: str, module: Module) -> int:
    """Devices in one group of a collective, from any of the forms in which XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return max(2, len(set(re.findall(r"\d+", pairs[1]))))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(groups[1].split(","))
    return module.num_partitions


def _product_flops(instruction: Instruction, types: dict[str, tuple[Array, ...]]) -> int:
    """Twice the multiplications of a convolution or matrix product, those with padding included; 0 for the rest."""
    if instruction.opcode not in ("convolution", "dot") or not instruction.arrays:
        return 0
    left, right = (types.get(name, ()) for name in instruction.operands[:2])
    outputs = math.prod(instruction.arrays[0].shape)
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [left[0].shape[int(axis)] for axis in axes[1].split(",") if axis] if axes and left else []
        return 2 * outputs * math.prod(contracted)
    window = re.search(r"\bsize=([\dx]+)", instruction.attributes)
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if not labels or not right:
        return 0
    inputs = right[0].shape[labels[1].index("i")]
    return 2 * outputs * inputs * math.prod(int(size) for size in (window[1].split("x") if window else []))


def _traffic(instruction: Instruction, by_name: dict[str, Instruction], module: Module) -> int:
    """Bytes between main memory and the chip's own that one instruction moves."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    operands = [by_name[name].arrays if name in by_name else () for name in instruction.operands]
    read = sum(array.hbm_bytes for arrays in operands for array in arrays)
    written = sum(array.hbm_bytes for array in instruction.arrays)
    if opcode in ("slice-start", "dynamic-slice-start"):
        piece = instruction.arrays[len(operands[0])]
        return piece.padded_bytes + piece.hbm_bytes
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return written  # the result repeats the operands
    if opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * sum(array.hbm_bytes for array in operands[1])
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, module)
    return read + written


def _fusion_traffic(instruction: Instruction, operands: list[tuple[Array, ...]], module: Module) -> int:
    """`_traffic` of a fusion: of operands that it only slices, or updates in place, the slices alone count."""
    inside = {step.name: step for step in module.computations.get(_attribute(instruction, "calls"), [])}
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for step in inside.values():
        for name in step.operands:
            users[name].append(step)
    total = sum(array.hbm_bytes for array in instruction.arrays)
    for step in inside.values():
        if step.opcode == "dynamic-update-slice" and step.root and not instruction.arrays[0].on_chip:
            total = inside[step.operands[1]].arrays[0].padded_bytes
    for step in inside.values():
        if step.opcode != "parameter" or not step.literal.isdigit() or int(step.literal) >= len(operands):
            continue
        using, whole = users[step.name], sum(array.hbm_bytes for array in operands[int(step.literal)])
        in_place = [user for user in using if user.opcode == "dynamic-update-slice" and user.operands[0] == step.name]
        slicing = [user for user in using if user.opcode in ("slice", "dynamic-slice") and user not in in_place]
        if whole and using and len(in_place) + len(slicing) == len(using):
            whole = min(whole, sum(array.padded_bytes for user in slicing for array in user.arrays))
        total += whole
    return total
