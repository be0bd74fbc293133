"""Lists what accelerators can do at best, according to their makers. `plan` and the logged utilisation compare with it.

The sources are the pages of Google Cloud's documentation on each TPU version (as of 2026-11) and NVIDIA's data sheets.
Peak compute is that of bfloat16 matrix products without sparsity. On a TPU float32 convolutions and products have the
same peak, because jax's default precision multiplies in bfloat16 there.
"""

import dataclasses
import importlib.util
import os
import pathlib


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
      name: as in the names of topologies.
      peak_flops: floating-point operations per second in bfloat16.
      memory_bytes: bytes of device memory (HBM; that of an L4 is GDDR6).
      memory_bandwidth: bytes per second between this memory and the cores.
      link_bandwidth: bytes per second that a chip can send to its neighbours over all links together; 0 = not known.
      usable_bytes: bytes of HBM that a program can have. It is the limit that the TPU compiler names when it refuses a
        program (libtpu 0.0.42.1); 0 = not known.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    usable_bytes: int = 0


GIB = 2**30
# docs.cloud.google.com/tpu/docs/v3, v4, v5e, v5p, v6e and tpu7x: peak in bfloat16, HBM and its bandwidth, and half of
# the bidirectional bandwidth between chips. v2 is from jax's own table (jax/_src/pallas/mosaic/tpu_info.py).
TPUS = {
    "v2": Chip("v2", 46e12, 16 * GIB, 716e9, 0, int(2 * 7.48 * GIB)),
    "v3": Chip("v3", 123e12, 32 * GIB, 900e9, 0, int(2 * 15.48 * GIB)),
    "v4": Chip("v4", 275e12, 32 * GIB, 1200e9, 300e9, int(30.75 * GIB)),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, int(15.75 * GIB)),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, int(95.74 * GIB)),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9, int(31.25 * GIB)),  # Trillium
    "v7x": Chip("v7x", 2307e12, 192 * GIB, 7380e9, 600e9, int(2 * 94.75 * GIB)),  # Ironwood
}
# NVIDIA's data sheets of each; peaks without sparsity, and half of NVLink's bidirectional bandwidth (L4 has none).
GPUS = {
    "A100": Chip("A100", 312e12, 80 * GIB, 2039e9, 300e9),
    "H100": Chip("H100", 989e12, 80 * GIB, 3350e9, 450e9),
    "H200": Chip("H200", 989e12, 141 * GIB, 4800e9, 450e9),
    "B200": Chip("B200", 2250e12, 180 * GIB, 8000e9, 900e9),
    "L4": Chip("L4", 121e12, 24 * GIB, 300e9, 0),
}


def _core(chip: Chip) -> Chip:
    """One of the two cores of a chip that are a device each for jax; it shares the links with the other one."""
    return dataclasses.replace(
        chip,
        peak_flops=chip.peak_flops / 2,
        memory_bytes=chip.memory_bytes // 2,
        memory_bandwidth=chip.memory_bandwidth / 2,
        link_bandwidth=chip.link_bandwidth / 2,
        usable_bytes=chip.usable_bytes // 2,
    )


# jax's `device_kind` -> what one device can do. The two cores of a v4 or v5p chip are one device for jax; those of v2,
# v3 and v7x are two. jax 0.10.2 with libtpu 0.0.42.1 names all TPUs so; GPUs have the name that the driver gives.
_KINDS = {
    "TPU v2": _core(TPUS["v2"]),
    "TPU v3": _core(TPUS["v3"]),
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    "TPU7x": _core(TPUS["v7x"]),
    "NVIDIA A100-PCIE-40GB": Chip("A100", 312e12, 40 * GIB, 1555e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40 * GIB, 1555e9, 300e9),
    "NVIDIA A100 80GB PCIe": Chip("A100", 312e12, 80 * GIB, 1935e9, 300e9),
    "NVIDIA A100-SXM4-80GB": GPUS["A100"],
    "NVIDIA H100 PCIe": Chip("H100", 756e12, 80 * GIB, 2000e9, 300e9),
    "NVIDIA H100 80GB HBM3": GPUS["H100"],
    "NVIDIA H200": GPUS["H200"],
    "NVIDIA B200": GPUS["B200"],
    "NVIDIA L4": GPUS["L4"],
}


def chip(device_kind: str) -> Chip | None:
    """Returns what a `jax.Device.device_kind` can do, half of a chip where jax has two devices of it.

    Returns:
      None for one that is not listed, such as a processor.
    """
    return _KINDS.get(device_kind)


# Devices of the system -> packages, of which one makes jax use them.
ACCELERATORS = {
    "nvidia[0-9]*": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "accel[0-9]*": ("libtpu",),
    "vfio/[0-9]*": ("libtpu",),
}


def accelerator_is_here(devices: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Whether this machine seems to have a GPU or a TPU that jax can use; jax is not started to find out."""
    allowed = os.environ.get("JAX_PLATFORMS", "")
    if allowed and set(allowed.split(",")) <= {"cpu"}:
        return False
    return any(
        any(devices.glob(pattern)) and any(importlib.util.find_spec(package) for package in packages)
        for pattern, packages in ACCELERATORS.items()
    )
