"""Defines the errors that commands report in one line, and helpers for their messages."""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong, not the program. The message says what was got, what was expected and what to change.

    Commands print the message alone and exit with status 1. An exception of a kind that is not defined here keeps its
    traceback.
    """


class StorageError(RuntimeError):
    """Something cannot be written, for instance because the disk is full. What was saved before is intact."""


class NonFiniteError(RuntimeError):
    """A metric became nan or infinite."""


def drop_output() -> None:
    """Sends what is still to be printed nowhere, where standard output cannot be written any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file, or closed
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def first_line(error: BaseException) -> str:
    """Returns the kind of an exception and the first line of its message, at most 300 characters.

    Where the cause is a full disk, it returns "No space left on device" alone.
    """
    text, cause = str(error).strip(), error
    while cause:  # libraries mention a full disk late in a long message, or only in the exception behind theirs
        if os.strerror(errno.ENOSPC) in str(cause):
            return os.strerror(errno.ENOSPC)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:300]}"


def check_choice(key: str, got: str, allowed: Iterable[str]) -> None:
    """Raises UserError, naming the alternatives, when `got`, the value of the key or flag `key`, is not allowed."""
    allowed = list(allowed)
    if got not in allowed:
        close = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{key}: got {got!r}, expected one of {', '.join(allowed)}.{hint}")


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT), and what it had done is saved."""
