"""The least time of a step, and the largest batch that fits."""

import dataclasses
from collections.abc import Mapping

from ieg_jax.hardware import Chip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a step, in seconds, by what the chip can do at best.

    The three kinds of work are taken to overlap perfectly, so a step takes at least the longest of them.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def binds(self) -> str:
        """Which of the three it is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, traffic: float, sent_bytes: float) -> Roofline:
    """The bound on the time of a step (Williams et al. 2009, with a third line for the interconnect).

    Args:
      chip: what it can do at best.
      flops: operations of one chip in a step.
      traffic: bytes that it reads from and writes to HBM.
      sent_bytes: bytes that it sends to other chips.
    """
    return Roofline(
        compute=flops / chip.peak_flops,
        memory=traffic / chip.memory_bandwidth,
        interconnect=sent_bytes / chip.link_bandwidth if sent_bytes else 0.0,
    )


def largest_batch(needed: Mapping[int, int], fixed: int, usable: int, unit: int) -> int:
    """Estimates the largest batch that fits, memory taken as linear in the batch.

    Args:
      needed: batch size -> bytes of HBM that a chip needs for it, of one or more compiled programs.
      fixed: bytes that do not grow with the batch, used where there is one size only: the state.
      usable: bytes of HBM that a program can have.
      unit: the batch must be a multiple of it.

    Returns:
      A multiple of `unit`; 0 where not even one unit fits.
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
