"""Keeps what XLA takes of a processor's memory at each step, and gives back after it, from going back to the system.

XLA asks malloc for its temporary arrays at each step. glibc gets such large pieces from the system by mmap, which gives
them back when they are freed, so that every step touches fresh pages again: half a million page faults in a step of
`ieg` with WRN-28-2. Taken from the heap, which is never trimmed, they are the same pages each time. Only the heap of
the main thread can hold so much; the others fall back to mmap. So programs have to be run by the thread that asks for
them. And the settings begin after the compiler is done, or its large pieces would stay as well.
"""

import contextlib
import ctypes

import jax

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # of malloc.h
PAD = 64 * 2**20  # by so many bytes more than asked for the heap grows

_prepared = False


def prepare() -> None:
    """Lets the thread that asks for a program on a processor run it; to be called before jax looks for devices."""
    global _prepared
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _prepared = True


def keep_freed() -> bool:
    """From now on the heap keeps what is freed; returns whether it does.

    It does after `prepare`, on processors, with glibc.
    """
    if not _prepared or jax.default_backend() != "cpu":
        return False
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(*option) for option in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, PAD)))
    return False
