"""What a compiled program does, read from its text, and the command that plans a run for a TPU slice."""

import collections
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import ROOT
from small_step import fixed_durations

from configs import cifar10, cifar100, default, own_data, webvision_mini
from ieg_jax import methods
from ieg_jax.data.batches import work_of_an_example
from ieg_jax.errors import UserError
from ieg_jax.hardware import GIB, TPUS, Chip
from ieg_jax.plan import __main__, hlo, report, supply, sweep
from ieg_jax.plan import compile as compile_lib
from ieg_jax.plan import run as plan_run
from ieg_jax.plan.compile import (
    Slice,
    Step,
    argument_bytes,
    check_divisible,
    compile_program,
    compile_step,
    data_shape,
    least_forward_passes,
    open_slice,
    refusal_bytes,
)
from ieg_jax.plan.environment import prepare_environment
from ieg_jax.plan.roofline import Roofline, largest_batch, roofline
from ieg_jax.runtime import mesh
from ieg_jax.train import program

LOOPS = """HloModule step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0:T(128)} get-tuple-element(%p), index=1
  %permuted = f32[16]{0:T(128)} collective-permute(%x), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  ROOT %next = (s32[], f32[16]) tuple(%i, %permuted)
}

%inner_condition (q: (s32[], f32[16])) -> pred[] {
  %q = (s32[], f32[16]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

%body (r: (s32[], f32[16])) -> (s32[], f32[16]) {
  %r = (s32[], f32[16]) parameter(0)
  %k = s32[] get-tuple-element(%r), index=0
  %y = f32[16]{0:T(128)} get-tuple-element(%r), index=1
  %reduced = f32[16]{0:T(128)} all-reduce(%y), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%add, metadata={op_name="jit(step)/loop/psum"}
  %again = (s32[], f32[16]) tuple(%k, %reduced)
  ROOT %inner = (s32[], f32[16]) while(%again), condition=%inner_condition, body=%inner_body
}

%condition (t: (s32[], f32[16])) -> pred[] {
  %t = (s32[], f32[16]) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (arg: f32[16], n: s32[]) -> f32[16] {
  %arg = f32[16]{0:T(128)} parameter(0)
  %n = s32[] parameter(1)
  %pair = (f32[8,2]{1,0:T(8,128)}, /*index=1*/bf16[3]{0}) all-reduce(%arg, %n), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%arg), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  %scattered = f32[4]{0} reduce-scatter(%done), channel_id=5, replica_groups={}, to_apply=%add, dimensions={0}
  %state = (s32[], f32[16]) tuple(%n, %done)
  %loop = (s32[], f32[16]) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[16]) while(%loop), condition=%condition, body=%empty_body
  ROOT %result = f32[16] get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_arrays_with_layouts_tuples_and_memory_spaces():
    f32, bf16, scalar = hlo.parse_arrays("(f32[8,3]{1,0:T(8,128)S(1)}, /*index=1*/bf16[2,5]{0,1:T(4,128)(2,1)}, u32[])")
    assert (f32.dtype, f32.shape, f32.bytes, f32.on_chip, f32.hbm_bytes) == ("f32", (8, 3), 96, True, 0)
    assert f32.padded_bytes == 8 * 128 * 4, "the tile lies over the axes 0 and 1"
    assert (bf16.bytes, bf16.hbm_bytes) == (20, 128 * 8 * 2), "2 → 128 along the minor axis 0, 5 → 8 along axis 1"
    assert (str(bf16), scalar.shape, scalar.bytes) == ("bf16[2,5]", (), 4)
    assert [array.bytes for array in hlo.parse_arrays("(pred[5]{0}, s4[3], token[])")] == [5, 2]


def test_how_often_each_computation_runs():
    module = hlo.parse(LOOPS)
    assert module.entry == "main"
    # Five times the outer body; inside it three times the inner one, read from its condition.
    assert module.runs["body"] == 5
    assert module.runs["inner_body"] == 15
    assert module.runs["inner_condition"] == 5 * 4
    assert "add" not in module.runs, "the scalar function of a reduction is not a computation that runs"
    assert module.unknown_loops == ["unknown"]


def test_collectives_by_kind_size_and_count():
    found = {one.name: one for one in hlo.find_collectives(hlo.parse(LOOPS))}
    # name -> kind, bytes with all runs, devices in a group, bytes sent
    expected = {
        "pair": ("all-reduce", 8 * 2 * 4 + 3 * 2, 4, 70 * 2 * 3 / 4),
        "start": ("all-gather", 16 * 4, 4, 64 * 3 / 4),  # the result, not the operand beside it
        "scattered": ("reduce-scatter", 16 * 4, 4, 64 * 3 / 4),  # the operand, from the four partitions
        "reduced": ("all-reduce", 5 * 16 * 4, 2, 320 * 2 * 1 / 2),
        "permuted": ("collective-permute", 15 * 16 * 4, 4, 960),
    }
    assert {n: (one.kind, one.bytes, one.group, one.sent_bytes) for n, one in found.items()} == expected
    assert found["reduced"].source == "jit(step)/loop/psum"
    assert next(iter(found)) == "permuted", "what sends most comes first"


def test_one_collective_in_several_fusions_counts_once():
    """A TPU spreads a collective over the fusions that run beside it; all parts have one channel."""
    parts = "\n".join(
        f"""%fused.{part} (x.{part}: f32[8]) -> f32[32] {{
  %x.{part} = f32[8]{{0}} parameter(0)
  ROOT %gather.{part} = f32[32]{{0}} all-gather(%x.{part}), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}
}}
"""
        for part in range(3)
    )
    calls = "\n".join(f"  %f.{n} = f32[32]{{0}} fusion(%arg), kind=kCustom, calls=%fused.{n}" for n in range(3))
    entry = f"ENTRY %main (arg: f32[8]) -> f32[32] {{\n  %arg = f32[8]{{0}} parameter(0)\n{calls}\n}}\n"
    module = hlo.parse(f"HloModule m\n\n{parts}\n{entry}")
    (one,) = hlo.find_collectives(module)
    assert (one.kind, one.bytes, one.count) == ("all-gather", 128, 1)


def test_memory_traffic_by_hand():
    text = """HloModule m

%fused (a: f32[100,8,128], i: s32[], b: f32[8,128]) -> f32[8,128] {
  %a = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,128]{1,0:T(8,128)} parameter(2)
  %row = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  %flat = f32[8,128]{1,0:T(8,128)} bitcast(%row)
  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%flat, %b)
}

%update (c: f32[100,8,128], d: f32[1,8,128], k: s32[]) -> f32[100,8,128] {
  %c = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %d = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %k = s32[] parameter(2)
  ROOT %put = f32[100,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%c, %d, %k, %k, %k)
}

ENTRY %main (x: f32[100,8,128], y: f32[8,128], n: s32[]) -> f32[100,8,128] {
  %x = f32[100,8,128]{2,1,0:T(8,128)} parameter(0)
  %y = f32[8,128]{1,0:T(8,128)} parameter(1)
  %n = s32[]{:T(128)S(6)} parameter(2)
  %copy = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %here = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy)
  %one = f32[8,128]{1,0:T(8,128)} fusion(%x, %n, %here), kind=kLoop, calls=%fused
  %two = f32[8,128]{1,0:T(8,128)} negate(%one)
  %row2 = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%two)
  ROOT %three = f32[100,8,128]{2,1,0:T(8,128)} fusion(%x, %row2, %n), kind=kLoop, calls=%update
}
"""
    tile = 8 * 128 * 4
    # Read y; read one row of x and write the sum; read and write for the negation; read a row and write it in place.
    assert hlo.memory_traffic(hlo.parse(text)) == (1 + (1 + 1) + 2 + (1 + 1)) * tile


def test_operations_inside_loops():
    """One product of 2·4·8·16 operations outside, a convolution of 2·(2·6·6·5)·3·9 in a loop of 7."""
    text = """HloModule m

%body (p: (s32[], f32[2,8,8,3], f32[3,3,3,5])) -> (s32[], f32[2,8,8,3], f32[3,3,3,5]) {
  %p = (s32[], f32[2,8,8,3], f32[3,3,3,5]) parameter(0)
  %x = f32[2,8,8,3]{3,2,1,0} get-tuple-element(%p), index=1
  %w = f32[3,3,3,5]{3,2,1,0} get-tuple-element(%p), index=2
  %conv = f32[2,6,6,5]{3,2,1,0} convolution(%x, %w), window={size=3x3}, dim_labels=b01f_01io->b01f
  ROOT %out = (s32[], f32[2,8,8,3], f32[3,3,3,5]) tuple(%p, %x, %w)
}

%condition (q: (s32[], f32[2,8,8,3], f32[3,3,3,5])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[4,8], b: f32[8,16]) -> f32[4,16] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %s = (s32[], f32[2,8,8,3], f32[3,3,3,5]) custom-call(), custom_call_target="x"
  %loop = (s32[], f32[2,8,8,3], f32[3,3,3,5]) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %dot = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501
    product, convolution = 2 * 4 * 8 * 16, 2 * (2 * 6 * 6 * 5) * 3 * 9
    expected = (product + 7 * convolution) / (product + convolution)
    assert hlo.loop_factor(hlo.parse(text)) == pytest.approx(expected)
    assert hlo.loop_factor(hlo.parse(LOOPS)) == 1.0, "nothing is multiplied there"
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("hello")


def test_the_reader_agrees_with_xla_on_a_program_that_it_compiles():
    """A scan of 6 products inside jit, against XLA's count of one."""
    matrix = jnp.ones((32, 32))

    def run(x):
        return jax.lax.scan(lambda carry, _: (carry @ matrix, None), x, None, length=6)[0]

    compiled = jax.jit(run).lower(matrix).compile()
    module = hlo.parse(compiled.as_text())
    assert module.unknown_loops == []
    assert hlo.loop_factor(module) == pytest.approx(6)


def test_roofline_by_hand():
    chip = Chip("x", peak_flops=100e12, memory_bytes=16 * GIB, memory_bandwidth=1e12, link_bandwidth=100e9)
    bound = roofline(chip, flops=2e12, traffic=30e9, sent_bytes=1e9)
    assert (bound.compute, bound.memory, bound.interconnect) == pytest.approx((0.02, 0.03, 0.01))
    assert (bound.seconds, bound.binds) == (bound.memory, "memory")
    lonely = Chip("x", 1.0, 1, 1.0, link_bandwidth=0.0)
    assert roofline(lonely, 5.0, 1.0, 0.0) == Roofline(5.0, 1.0, 0.0)


@pytest.mark.parametrize("needed, unit, expected", [
    # One size: (10000 − 2000) / 50 = 160, and the next multiple of 48 below it.
    ({64: 2000 + 64 * 50}, 48, 144),
    # Two sizes show what is fixed: (10000 − 3000) / 40 = 175.
    ({64: 3000 + 64 * 40, 128: 3000 + 128 * 40}, 16, 160),
    ({64: 2000 + 64 * 1000}, 16, 0),
])  # fmt: skip
def test_largest_batch_by_hand(needed, unit, expected):
    assert largest_batch(needed, fixed=2000, usable=10_000, unit=unit) == expected


def test_what_a_refusal_says():
    assert refusal_bytes("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded") == 20.5 * GIB
    assert refusal_bytes("the total memory required for HLO temporaries (224.11G) exceeds") == int(224.11 * GIB)
    assert refusal_bytes("RESOURCE_EXHAUSTED: no number") == 0


def test_least_forward_passes():
    config = default.get_config()
    config.trusted.batch_size = config.batch_size
    passes = {}
    for name in ("ieg", "l2r", "supervised", "trusted_only"):
        config.method.name = name
        passes[name] = least_forward_passes(config)
    assert passes == {"ieg": 22, "l2r": 10, "supervised": 3, "trusted_only": 3}
    config.meta.layers = "^head/"
    assert least_forward_passes(config) is None


def test_shapes_of_known_data_sets_without_data():
    _, shape = data_shape(cifar100.get_config())
    assert shape == program.DataShape((32, 32, 3), (32, 32, 3), 100, 50_000 - 100 * 10, 50_000, 100 * 10)
    _, shape = data_shape(webvision_mini.get_config())
    assert shape == program.DataShape((224, 224, 3), (224, 224, 3), 50, 65_944, 65_944, 1)
    config = default.get_config()
    config.data.image_size, config.trusted.fraction = 12, 0.1
    assert data_shape(config)[1] == program.DataShape((12, 12, 1), (12, 12, 1), 10, 1297 - 130, 1297, 130)


def test_shapes_of_ones_own_data_are_loaded(tmp_path):
    labels = np.arange(40) % 4
    np.savez(tmp_path / "own.npz", images=np.zeros((40, 6, 5, 3), np.uint8), labels=labels, clean_labels=labels)
    config = default.get_config()
    config.data.name, config.data.train = "arrays", str(tmp_path / "own.npz")
    config.trusted.per_class = 2
    assert data_shape(config)[1] == program.DataShape((6, 5, 3), (6, 5, 3), 4, 32, 40, 8)


def test_what_follows_from_the_data_is_in_the_configuration(tmp_path):
    labels = np.arange(40) % 4
    np.savez(tmp_path / "own.npz", images=np.zeros((40, 30, 30, 3), np.uint8), labels=labels, clean_labels=labels)
    config = own_data.get_config("backbone=none")
    config.data.name, config.data.train, config.trusted.source = "arrays", str(tmp_path / "own.npz"), "train"
    config.trusted.per_class = 1
    resolved, shape = data_shape(config)
    assert (resolved.data.image_size, resolved.model.depth, shape.image) == (28, 16, (28, 28, 3))
    assert config.data.image_size == config.model.depth == -1, "what was given stays as it is"


@pytest.mark.parametrize("topology, message", [
    ("v9:2x2", "unknown chip: got 'v9', expected one of v4, v5e, v5p, v6e"),
    ("v5e", "v5e comes in slices of 1x1, 2x2, 2x4, 4x4"),
    ("v5e:3x3", "v5e comes in slices of 1x1, 2x2, 2x4, 4x4"),
    ("v4:4x4", "v4 comes in slices of 1x1x1, 2x2x1, 2x2x2"),
])  # fmt: skip
def test_impossible_slices(topology, message):
    with pytest.raises(UserError) as error:
        open_slice(topology)
    assert message in str(error.value)


def test_batches_that_the_chips_do_not_divide():
    with pytest.raises(UserError) as error:
        check_divisible(cifar10.get_config(), 16)
    assert str(error.value) == (
        "batch_size=100, eval_batch_size=500: no multiple of 16 chips; use for instance --config.batch_size=96 "
        "--config.eval_batch_size=496"
    )
    config = cifar10.get_config()
    config.batch_size, config.eval_batch_size, config.batch_groups = 128, 512, 48
    with pytest.raises(UserError, match="batch_size=128: no multiple of 16 chips and 48 batch groups; .*=144"):
        check_divisible(config, 16)
    config.batch_groups = 16
    check_divisible(config, 16)


def test_the_compiler_must_be_installed(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plan\]'"):
        prepare_environment()


def test_variants_of_a_sweep():
    config = default.get_config()
    config.batch_groups = 8
    changed = [(c.model.remat, c.batch_groups) for c in sweep.variants(config, 8, ["remat", "batch_groups"])]
    assert changed == [(True, 8), (False, 1)], "8 is what it has"
    config.batch_size = 100
    assert [c.batch_groups for c in sweep.variants(config, 16, ["batch_groups"])] == [1], "16 does not divide 100"


def small_config(groups, **overrides):
    config = default.get_config()
    config.model.name, config.batch_size, config.batch_groups = "tiny", 64, groups
    config.update_from_flattened_dict(overrides)
    return config


def small_program(groups):
    config = small_config(groups, **{"trusted.batch_size": 64})
    shape = program.DataShape((8, 8, 1), (8, 8, 1), 10, 1000, 1000, 100)
    return program.build(config, mesh.create(config), shape, fixed_durations(log_every=50))


def test_bytes_of_the_arguments():
    run = small_program(8)
    parts = argument_bytes(run)
    # conv 9·8 + 9·64, two batch norms of 2·8, dense 80 + 10
    assert parts["parameters"] == parts["average of parameters"] == 4 * (72 + 576 + 32 + 90)
    assert parts["batch statistics"] == 4 * 32
    # A device's 8 of 64: an image, one view and a trusted image of 64 pixels, six numbers of 32 bits.
    assert parts["batch"] == 8 * (3 * 64 + 6) * 4
    # The axis fsdp splits what it can: a sharded array counts with its part.
    config = small_config(8, **{"trusted.batch_size": 64})
    config.mesh.fsdp = 8
    shardings = mesh.create(config)
    array = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(shardings.mesh, PartitionSpec("fsdp")))
    state = dict.fromkeys(("ema_params", "opt_state", "batch_stats", "method", "rows", "examples"))
    fake = types.SimpleNamespace(state=types.SimpleNamespace(params=array, **state), window=None, batch=None)
    assert argument_bytes(fake)["parameters"] == 2 * 3 * 4


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What the command prints and writes for the eight simulated devices, with a group for each and with one group."""
    folder = tmp_path_factory.mktemp("plan")
    config = small_config(8, eval_batch_size=64)
    speed = {"cores": 4, "examples_per_cpu_second": 2.0, "images_per_example": 3, "assembly_bytes_per_second": 1e9}
    (folder / "report.json").write_text(json.dumps({"throughput": speed | {"read_seconds": None}}))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("XDG_CACHE_HOME", str(folder))
        values = types.SimpleNamespace(
            config=config, topology="cpu:8", sweep=["batch_groups"], out=str(folder / "plan.json"),
            doctor=str(folder / "report.json"), cores=5, reads_in_flight=None, **dict.fromkeys(__main__.MEASURED),
        )  # fmt: skip
        patch.setattr(__main__, "flags", types.SimpleNamespace(FLAGS=values))
        patch.setattr(__main__, "prepare_environment", lambda: None)
        patch.setattr(plan_run, "open_slice", lambda topology: Slice("cpu:8", TPUS["v5e"], jax.devices()))
        __main__.main([])
    written = json.loads((folder / "plan.json").read_text())
    return " ".join(printed.getvalue().split()), {row["batch_groups"]: row for row in written["steps"]}, written


def test_the_report(reported):
    printed, rows, _ = reported
    for part in (
        "tiny, ieg, batch 64 on 8 v5e chips (cpu:8): 8 images on each", "it fits", "a step takes at least",
        "all-reduce", "Largest batch that fits, estimated from one compiled size", "variants, per chip", "binds",
    ):  # fmt: skip
        assert part in printed
    assert rows[8]["flops_over_least"] == pytest.approx(1, abs=0.1)
    assert rows[8]["flops_per_image"] == rows[8]["flops"] / 8, "each chip has 8 images, and its own operations"
    assert rows[1]["sent_bytes"] > 2 * rows[8]["sent_bytes"]
    assert "batch_groups=8 keeps them where they are" in "\n".join(report.notes(rows[1], TPUS["v5e"], 0))


def test_the_input_is_the_last_line_of_the_report(reported):
    """Five processors, each 2 · 3 views a second, and 3 views an example, are 10 examples/s: hardly anything."""
    printed, rows, written = reported
    data = written["input"]
    assert data["host"] | {"read_seconds": None} == {
        "cores": 5, "images_per_cpu_second": 6.0, "read_seconds": None, "reads_in_flight": 80,
        "assembly_bytes_per_second": 1e9,
    }  # fmt: skip
    # Three images of 64 float32 pixels and six numbers, as in the arguments of the step.
    assert data["example"] == {"images": 3.0, "reads": 2.0, "size": (3 * 64 + 6) * 4}
    assert data["examples_per_second"] == {"decoding and augmentation": 10.0, "assembly of batches": 1e9 / 792}
    assert (data["num_hosts"], data["wanted"]) == (1, rows[8]["images_per_second"])
    assert data["waiting"] == pytest.approx(1 - 10 / rows[8]["images_per_second"])
    wanted = f"its chips take {rows[8]['images_per_second']:,.0f}."
    assert printed.endswith(
        "The chip waits 100% of the time for data: a host delivers 10 examples/s at most (decoding and augmentation "
        f"binds), and {wanted}"
    )
    assert "input of a host" in printed and "│ decoding and augmentation │ 3 images │ 10 │" in printed


# What an example of IEG on WebVision has: an image, a strong view and a trusted image of 224 × 224 pixels in three
# colours, four numbers of the noisy example and two of the trusted one.
WEBVISION = supply.Example(images=3, reads=2, size=3 * 224 * 224 * 3 * 4 + 6 * 4)


def test_what_an_example_asks_of_a_host():
    config = webvision_mini.get_config()
    row = {"batch_size": 128, "num_chips": 16, "images_per_second": 8000.0}
    row["arguments"] = {"batch": 8 * (3 * 224 * 224 * 3 * 4 + 6 * 4)}  # of the 8 examples of a chip
    known = supply.Host(assembly_bytes_per_second=1_806_360e3)
    example, made = supply.supply(config, row, known, 4)
    assert (example, example.size) == (WEBVISION, 1_806_360)
    assert made == supply.Supply({"assembly of batches": 1000.0}, 2000.0)
    assert supply.supply(config, row, supply.Host(), 4) is None, "nothing is known of the host"
    del row["images_per_second"]
    assert supply.supply(config, row, known, 4) is None, "the step does not fit"
    config.method.name, config.augment.num_views = "supervised", 2
    assert work_of_an_example(config, methods.get("supervised").streams) == (1, 1)
    # Half as many trusted images as noisy ones, and two strong views.
    config.method.name, config.batch_size, config.trusted.batch_size, config.augment.num_views = "ieg", 64, 32, 3
    assert work_of_an_example(config, methods.get("ieg").streams) == (3.5, 1.5)


def test_the_slowest_part_of_the_input_binds():
    """112 · 100 / 3 = 3,733; 1,792 / 0.05 / 2 = 17,920; 5.067e9 / 1,806,360 = 2,805."""
    host = supply.Host(112, 100.0, 0.05, 16 * 112, 5.067e9)
    found = supply.bounds(host, WEBVISION)
    assert {name: round(rate) for name, rate in found.items()} == {
        "decoding and augmentation": 3733, "reading": 17920, "assembly of batches": 2805,
    }  # fmt: skip
    enough, wanting = supply.Supply(found, 2531.0), supply.Supply(found, 4780.0)
    assert (enough.binds, round(enough.delivered), enough.waiting) == ("assembly of batches", 2805, 0)
    assert str(enough) == (
        "The chip does not wait for data: a host delivers 2,805 examples/s at most (assembly of batches binds), and "
        "its chips take 2,531, which leaves 11% headroom."
    )
    assert wanting.waiting == pytest.approx(0.413, abs=5e-4)
    assert str(wanting).startswith("The chip waits 41% of the time for data: a host delivers 2,805 examples/s at most")
    slow = supply.bounds(dataclasses.replace(host, read_seconds=1.0), WEBVISION)
    assert supply.Supply(slow, 2531.0).binds == "reading" and slow["reading"] == 896


def test_what_is_known_of_a_host(tmp_path):
    file = tmp_path / "report.json"
    speed = {"cores": 2, "examples_per_cpu_second": 50.0, "images_per_example": 3, "read_seconds": 0.1}
    file.write_text(json.dumps({"throughput": speed | {"assembly_bytes_per_second": 2e9}}))
    assert supply.read_host(str(file), {"cores": None}) == supply.Host(2, 150.0, 0.1, 32, 2e9)
    given = {"cores": 112, "read_seconds": 0.02, "reads_in_flight": None}
    assert supply.read_host(str(file), given) == supply.Host(112, 150.0, 0.02, 1792, 2e9)
    assert supply.read_host("", {"cores": 8, "reads_in_flight": 5}) == supply.Host(cores=8, reads_in_flight=5)
    assert supply.read_host("", {}) == supply.Host()
    for text in ("{}", "[]", "no JSON", json.dumps({"throughput": {"cores": 2, "images_per_second": 9.0}})):
        file.write_text(text)
        with pytest.raises(UserError, match=r"--doctor=.*holds no speeds of the input.*ieg_jax.data.doctor"):
            supply.read_host(str(file), {})
    with pytest.raises(UserError, match="--doctor=gone.json: cannot be read: No such file"):
        supply.read_host("gone.json", {})


def test_hosts_of_a_slice():
    devices = [types.SimpleNamespace(process_index=number // 4) for number in range(16)]
    assert Slice("v5e:4x4", TPUS["v5e"], devices).num_hosts == 4


def test_with_a_group_for_each_device_nothing_but_gradients_and_scalars_is_sent(reported):
    """The whole list of what one IEG step sends between eight devices.

    Five arrays of each parameter's shape: the gradient of the lookahead, that of the trusted loss after it, and the
    last gradient in three parts (XLA adds up over the devices before it adds the parts of the standard view, the strong
    view and the mixup pool). The moving averages of batch norm. Of each example ω, λ, its id, whether its label is
    true, the class of its pseudo label and the probability that this gives to the given label, for the record of
    metrics and the memory. And scalars: the sum that normalises ω, the losses, the sums of the metrics.
    """
    row, run = reported[1][8], small_program(8)
    assert row["unknown_loops"] == []
    assert {one["count"] for one in row["collectives"]} == {1}
    arrays = [(one["kind"], *hlo.parse_arrays(text)) for one in row["collectives"] for text in one["arrays"]]

    # A dense layer's gradient may be reduced transposed, hence the sorted shapes.
    gradients = collections.Counter(tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(run.state.params))
    statistics = collections.Counter(leaf.shape for leaf in jax.tree.leaves(run.state.batch_stats))
    expected = collections.Counter({shape: 5 * count for shape, count in gradients.items()}) + statistics
    records = [array for _, array in arrays if 64 in array.shape]
    scalars = [array for _, array in arrays if array.shape == ()]
    rest = [(kind, array) for kind, array in arrays if 64 not in array.shape and array.shape != ()]

    assert {kind for kind, _ in rest} == {"all-reduce"}
    assert {array.dtype for _, array in rest} == {"f32"}
    assert collections.Counter(tuple(sorted(array.shape)) for _, array in rest) == expected
    # One row of the window each; XLA may gather the window's 50 rows instead, in the memory that they have anyway.
    assert len(records) == 6, records
    assert sum(array.bytes for array in records) <= 50 * 64 * (5 * 4 + 1)
    assert len(scalars) <= 24
    assert {array.bytes for array in scalars} == {4}


def test_with_one_group_images_are_sent(reported):
    shapes = [hlo.parse_arrays(text)[0].shape for one in reported[1][1]["collectives"] for text in one["arrays"]]
    assert any(math.prod(shape) >= 64 * 8 * 8 for shape in shapes), "the mixup pool is gathered"


@pytest.fixture
def cpu_slice(tmp_path, monkeypatch):
    """A slice of the eight simulated devices, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Slice("cpu:8", TPUS["v5e"], jax.devices())


def test_a_result_is_kept(cpu_slice, monkeypatch):
    config = small_config(8, **{"method.name": "supervised"})
    config.eval_batch_size = 64
    said = []
    first = compile_step(config, cpu_slice, said.append)
    assert len(said) == 2
    assert first.compiled.needed > first.compiled.memory["temporary"] > 0
    assert first.compiled.flops > 0
    assert first.num_chips == 8

    monkeypatch.setattr(compile_lib, "compile_program", None)
    again = compile_step(config, cpu_slice, said.append)
    assert len(said) == 2, "neither traced nor compiled"
    assert (again.compiled, again.arguments, again.forward_flops) == (
        first.compiled, first.arguments, first.forward_flops,
    )  # fmt: skip
    # Another seed is another request, but the same program.
    config.seed = 1
    assert compile_step(config, cpu_slice, said.append).compiled == first.compiled
    assert said[2:] == ["tracing the step"]


def test_a_program_that_does_not_fit_is_a_result(cpu_slice, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Ran out of memory\nUsed 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G."

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    compiled = compile_program(Lowered())
    assert (compiled.memory, compiled.needed) == ({}, 20 * GIB)
    config = small_config(8, **{"trusted.batch_size": 64})
    step = Step(config, 8, {"parameters": 4 * GIB, "batch": GIB}, 1.0, {"trace": 1.0, "lower": 1.0}, compiled)
    row = report.summarize(step, TPUS["v5e"])
    assert not row["fits"]
    # (15.75 − 4) GiB at a quarter of a GiB for each example
    assert sweep.largest([row]) == 40
    assert "does not fit" in report.notes(row, TPUS["v5e"], 40)[0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'")
def test_the_command_compiles_for_a_real_slice(tmp_path):
    out = tmp_path / "plan.json"
    arguments = [
        sys.executable, "-m", "ieg_jax.plan", "--config=configs/default.py", "--topology=v5e:2x2",
        "--config.model.name=tiny", "--config.batch_groups=4", f"--out={out}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    root = ROOT
    done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["steps"]
    assert row["fits"]
    assert row["usable_bytes"] == int(15.75 * GIB)
    assert set(row["by_kind"]) <= {"all-reduce", "all-gather"}
    images = 16 * 8 * 8 * 4  # a chip's images
    assert max(one["bytes"] for one in row["collectives"] if one["kind"] == "all-gather") < images * 4
    # Its answer is kept: another run takes no compilation.
    done = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert "compiling" not in done.stderr
