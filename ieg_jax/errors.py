"""The error that means: the input is wrong, not the program."""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what was got, what was expected and what to change.

    Commands print the message alone and exit with status 1; any other exception keeps its traceback.
    """


class StorageError(RuntimeError):
    """Something cannot be written: a full disk, a bucket that is gone. What was saved before is intact."""


class NonFiniteError(RuntimeError):
    """A metric became nan or infinite."""


def first_line(error: BaseException) -> str:
    """The kind of an exception and the first line of its message, at most 300 characters; a full disk by its name."""
    text, cause = str(error).strip(), error
    while cause:  # libraries bury it in a page of their own state, or in what they raise it from
        if os.strerror(errno.ENOSPC) in str(cause):
            return os.strerror(errno.ENOSPC)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0][:300]}"


def check_choice(key: str, got: str, allowed: Iterable[str]) -> None:
    """Raises UserError naming the alternatives when `got`, the value of the config key `key`, is not allowed."""
    allowed = list(allowed)
    if got not in allowed:
        close = difflib.get_close_matches(str(got), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{key}: got {got!r}, expected one of {', '.join(allowed)}.{hint}")
