"""Samples of a call: its seconds, and what other processes did meanwhile. For the peers too: standard library alone."""

import gc
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

SHORTEST = 0.1  # seconds

Row = dict[str, Any]
"""What was measured, as it stands in the file: `unit`, `samples`, and perhaps

- `others`: for each sample the cores that other processes used meanwhile (None = not known here);
- `base`: the row that this one is a multiple of;
- `gflop`, `passes`, `mib`: XLA's count of operations, the least possible cost in forward passes, peak memory;
- `compile_seconds`, and whatever else is known of it.
"""


def busy() -> float | None:
    """Processor seconds that the whole machine has spent since it started, all cores; None where it does not say."""
    try:
        with open("/proc/stat") as file:
            ticks = list(map(int, file.readline().split()[1:]))
    except OSError:
        return None
    return (sum(ticks[:3]) + sum(ticks[5:8])) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def sample(function: Callable[[], Any]) -> dict[str, float | None]:
    """Calls a function once.

    Returns:
      `seconds`, `others`: how many cores other processes used meanwhile; None where that is not known, as of a call
      that took less than a tenth of a second: the system counts in hundredths.
    """
    before, mine, began = busy(), own(), time.perf_counter()
    function()
    seconds, mine, after = time.perf_counter() - began, own() - mine, busy()
    known = before is not None and after is not None and seconds >= SHORTEST
    return {"seconds": seconds, "others": max(0.0, (after - before - mine) / seconds) if known else None}


def interleaved(
    calls: Mapping[str, Callable[[], dict[str, float | None]]], rounds: int
) -> dict[str, list[dict[str, float | None]]]:
    """Takes a sample of each in turn, `rounds` times, after one of each that does not count.

    Args:
      calls: name -> function that takes one sample.
      rounds: samples of each.
    """
    taken = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            found = call()
            if number:
                taken[name].append(found)
        gc.collect()
    return taken


def row(taken: list[dict[str, float | None]], **facts: Any) -> Row:
    """A row of seconds from samples."""
    return {
        "unit": "s",
        "samples": [found["seconds"] for found in taken],
        "others": [found["others"] for found in taken],
        **facts,
    }


def rate(taken: list[dict[str, float | None]], amount: float, unit: str, **facts: Any) -> Row:
    """A row of how many a second, where each sample did `amount` of them."""
    seconds = row(taken)
    return seconds | {"unit": unit, "samples": [amount / value for value in seconds["samples"]], **facts}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
