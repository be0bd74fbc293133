"""Computes the least time of a step, and estimates the largest batch that fits."""

import dataclasses
from collections.abc import Mapping

from ieg_jax.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least times, in seconds, that a step spends on operations, on its device memory and on sending.

    The three are assumed to overlap perfectly, so a step takes at least the longest of them.

    Attributes:
      compute: for the operations.
      memory: for reading and writing device memory (HBM).
      interconnect: for sending to other chips.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def binds(self) -> str:
        """The name of the longest of the three."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, traffic: float, sent_bytes: float) -> Roofline:
    """Computes the least time of a step (Williams et al. 2009, with the interconnect as a third bound).

    Args:
      chip: what a chip can do at best.
      flops: operations of one chip in a step.
      traffic: bytes that one chip reads from and writes to HBM in a step.
      sent_bytes: bytes that one chip sends to other chips in a step.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        memory=traffic / chip.memory_bandwidth,
        interconnect=sent_bytes / chip.link_bandwidth if sent_bytes else 0.0,
    )


def largest_batch(needed: Mapping[int, int], fixed: int, usable: int, unit: int) -> int:
    """Estimates the largest batch that fits. Device memory is assumed to be linear in the batch.

    Args:
      needed: batch size -> bytes of HBM that a chip needs for it, from one or more compiled programs.
      fixed: bytes of HBM that do not grow with the batch; used only where `needed` has a single size.
      usable: bytes of HBM that a program can have.
      unit: the batch must be a multiple of this.

    Returns:
      A multiple of `unit`; 0 where not even a batch of this size fits.
    """
    sizes = sorted(needed)
    small, large = sizes[0], sizes[-1]
    if small == large:
        start, slope = fixed, (needed[large] - fixed) / large
    else:
        slope = (needed[large] - needed[small]) / (large - small)
        start = needed[large] - slope * large
    if slope <= 0:
        return large // unit * unit
    return max(0, int((usable - start) / slope) // unit * unit)
