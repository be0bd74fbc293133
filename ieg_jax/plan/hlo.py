"""Reads from the text of a compiled program what it does: its collectives, its loops, its traffic with HBM.

XLA's own cost analysis counts the body of a loop once and says nothing about collectives. Here every instruction is
counted as often as it runs. The text is that of `jax.stages.Compiled.as_text()`, in XLA's language HLO.
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
# These instructions move nothing between HBM and the chip: they only give arrays another name, or they stand for other
# instructions, which are counted themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional", "opt-barrier", "domain", "add-dependency", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array, and where it lies.

    Attributes:
      dtype: the name that XLA has for it, such as `f32`.
      shape: sizes of the axes.
      on_chip: whether it lies in the chip's own vector or scalar memory, and not in HBM.
      padded: number of elements, with the padding that its layout adds.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False
    padded: int = 0

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return math.ceil(math.prod(self.shape) * _BITS.get(self.dtype, 0) / 8)

    @property
    def padded_bytes(self) -> int:
        """Bytes with the padding that fills up the tiles of its layout."""
        return math.ceil(self.padded * _BITS.get(self.dtype, 0) / 8)

    @property
    def hbm_bytes(self) -> int:
        """Bytes that it takes in HBM, with padding; 0 for an array on the chip."""
        return 0 if self.on_chip else self.padded_bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program: `name = arrays opcode(operands), attributes`.

    Attributes:
      name: is unique in its computation.
      opcode: what it does, such as `add`.
      arrays: the results; those of nested tuples are listed flat.
      operands: names of the instructions whose results it takes.
      literal: the text in the brackets, from which the operands are read; of a parameter it is its number.
      attributes: the text behind the brackets.
      root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: name -> instructions in the order in which they run.
      entry: name of the computation with which the program starts.
      num_partitions: over how many devices the program is split.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    num_partitions: int = 1

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one run of the program; name -> count.

        Every branch of a conditional is counted as taken. The body of a loop is counted once where the text does not
        say how often it runs (see `unknown_loops`).
        """
        return _count_runs(self, loops=True)

    @functools.cached_property
    def unknown_loops(self) -> list[str]:
        """Names of the loops of which the text does not say how often their body runs."""
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
      name: name of the instruction.
      arrays: the results on one device; for a reduce-scatter the operands, which are larger.
      count: how often it runs in one run of the program.
      group: how many devices take part together.
      source: jax's name of the operation from which it comes; where XLA joined several, that of one of them.
    """

    kind: str
    name: str
    arrays: tuple[Array, ...]
    count: int
    group: int
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the arrays in all runs together."""
        return self.count * sum(array.bytes for array in self.arrays)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in all runs together, if it uses the usual ring algorithm."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.bytes


def parse(text: str) -> Module:
    """Parses the text of an HLO module.

    Raises:
      ValueError: where the text has no entry computation.
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
    """Parses one line of a computation; returns None for a line that is no instruction."""
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
    """Returns the arrays in the text of a type: `f32[8,3]{1,0:T(8,128)S(1)}`, or a tuple. Tokens are left out."""
    return tuple(
        _array(dtype, sizes, order, layout) for dtype, sizes, order, layout in _ARRAY.findall(text) if dtype in _BITS
    )


def trip_count(loop: Instruction, module: Module) -> int | None:
    """Returns how often a `while` runs its body; None where the text does not say it.

    XLA writes the number down where it knows it. Otherwise it is read from a condition that compares a counter with a
    constant. The counter is assumed to start at 0 and to rise by 1, as in jax's loops.
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
    """Returns the collectives that run, in descending order of the bytes that they send.

    XLA may split a collective into a start and a done instruction, or spread it over several fusions so that it runs
    beside other instructions. It still counts as one, which is recognised because all its parts have the same channel.
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
                kind = "reduce-scatter"  # on a TPU: an all-reduce of which only a slice is kept
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
    """Returns the bytes that one run of the program reads from and writes to HBM, with padding.

    Each instruction outside fusions is assumed to read its operands once and to write its results once, except arrays
    on the chip. Where an array is only sliced, or updated in place, the slice counts. The true number can be a little
    larger, where a convolution reads an image several times.
    """
    total = 0
    for name in _run_by_control_flow(module):
        types = {instruction.name: instruction for instruction in module.computations[name]}
        per_run = sum(_traffic(instruction, types, module) for instruction in module.computations[name])
        total += per_run * module.runs.get(name, 0)
    return total


def loop_factor(module: Module) -> float:
    """Returns by how much XLA's count of a program's operations is too small, because it counts each loop body once.

    It is the ratio of the operations of convolutions and matrix products with loop bodies counted as often as they run,
    and counted once; 1 for a program without loops.
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
    """Makes an array of the parts of its text.

    Args:
      dtype: such as `f32`.
      sizes: sizes of the axes, such as `8,3`.
      order: the axes from the fastest one in memory to the slowest, such as `1,0`.
      layout: tiles and memory space, such as `:T(8,128)S(1)`.
    """
    shape = tuple(int(size.replace("<=", "")) for size in sizes.split(",") if size.strip())
    padded = list(shape)
    tile = re.search(r"T\(([\d,]+)\)", layout or "")
    if tile and order:
        # A tile spans the fastest axes of the array. Its last number is its size along the fastest one.
        fastest_first = [int(axis) for axis in order.split(",")]
        for axis, size in zip(fastest_first, reversed([int(size) for size in tile[1].split(",")]), strict=False):
            padded[axis] = math.ceil(padded[axis] / size) * size
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, shape, bool(space) and int(space[1]) > 0, math.prod(padded))


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _attribute(instruction: Instruction, name: str) -> str:
    """Returns an attribute of an instruction that names a computation; "" where it has no such attribute."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    return match[1] if match else ""


def _callees(instruction: Instruction, module: Module) -> list[tuple[str, int]]:
    """Returns the computations that an instruction runs, and how often.

    The computation that a reduction applies to pairs of numbers is left out.
    """
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
    """Returns the computations whose instructions run one after the other, which those inside fusions do not."""
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
    """Returns how often each computation runs; with `loops` False, as if each loop ran its body once."""
    counts: dict[str, int] = collections.Counter({module.entry: 1})
    # In the text a computation stands before those that call it. In reverse order, the counts of all its callers are
    # complete when a computation is reached.
    for name in reversed(module.computations):
        for instruction in module.computations[name]:
            for callee, times in _callees(instruction, module):
                counts[callee] += counts[name] * (times if loops or instruction.opcode != "while" else 1)
    return dict(counts)


def _moved(kind: str, instruction: Instruction, types: dict[str, tuple[Array, ...]]) -> tuple[Array, ...]:
    """Returns `Collective.arrays` of an instruction; `types` is name -> arrays of the instructions beside it."""
    operands = tuple(array for name in instruction.operands for array in types.get(name, ()))
    if kind == "reduce-scatter" and operands:
        return operands
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # It returns (operands, results, flags), with as many results as operands.
        half = len(operands) or 1
        return instruction.arrays[half : 2 * half]
    return instruction.arrays


def _group_size(attributes: str, module: Module) -> int:
    """Returns how many devices are in one group of a collective. XLA writes groups in several forms."""
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
    """Returns twice the multiplications of a convolution or matrix product, with those of padding; else 0."""
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
    """Returns the bytes that one instruction reads from and writes to HBM."""
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
        return written  # its result contains the operands too, so this counts reading and writing
    if opcode in ("slice", "dynamic-slice", "gather"):
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * sum(array.hbm_bytes for array in operands[1])
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, module)
    return read + written


def _fusion_traffic(instruction: Instruction, operands: list[tuple[Array, ...]], module: Module) -> int:
    """Returns `_traffic` of a fusion. Of an operand that it only slices or updates in place, the slices alone count."""
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
