"""What the machine has, without starting jax."""

import importlib.util

import pytest

from ieg_jax import hardware
from ieg_jax.hardware import GIB


@pytest.mark.parametrize("kind, name, tflops, gib, gbps", [
    # A device of v2, v3 and v7x is half a chip: 46, 123 and 2,307 TFLOP/s, 16, 32 and 192 GiB, 716, 900 and 7,380 GB/s.
    ("TPU v2", "v2", 23, 8, 358),
    ("TPU v3", "v3", 61.5, 16, 450),
    ("TPU v4", "v4", 275, 32, 1200),
    ("TPU v5 lite", "v5e", 197, 16, 819),
    ("TPU v5", "v5p", 459, 95, 2765),
    ("TPU v6 lite", "v6e", 918, 32, 1638),
    ("TPU7x", "v7x", 1153.5, 96, 3690),
    ("NVIDIA A100-SXM4-40GB", "A100", 312, 40, 1555),
    ("NVIDIA A100-SXM4-80GB", "A100", 312, 80, 2039),
    ("NVIDIA H100 PCIe", "H100", 756, 80, 2000),
    ("NVIDIA H100 80GB HBM3", "H100", 989, 80, 3350),
    ("NVIDIA H200", "H200", 989, 141, 4800),
    ("NVIDIA B200", "B200", 2250, 180, 8000),
    ("NVIDIA L4", "L4", 121, 24, 300),
])  # fmt: skip
def test_what_a_device_can_do(kind, name, tflops, gib, gbps):
    chip = hardware.chip(kind)
    assert (chip.name, chip.peak_flops, chip.memory_bytes, chip.memory_bandwidth) == (
        name, tflops * 1e12, gib * GIB, gbps * 1e9,
    )  # fmt: skip


def test_what_a_program_can_have_is_less_than_the_memory_but_for_v5p():
    for chip in hardware.TPUS.values():
        assert (0.9 * chip.memory_bytes < chip.usable_bytes < chip.memory_bytes) == (chip.name != "v5p")


def test_an_accelerator_needs_a_device_and_the_package_that_uses_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert not hardware.accelerator_is_here(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert not hardware.accelerator_is_here(tmp_path), "jax has no CUDA here"
    (tmp_path / "accel0").touch()
    assert hardware.accelerator_is_here(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not hardware.accelerator_is_here(tmp_path)
