"""Writes files so that they appear whole or not at all, on a disk or on a bucket.

Whoever reads a file while it is written, or after the writer was killed, finds the old content or the new content and
never a part of it. On a disk the content is first written to `<name>.<process>.partial` beside the file, and this is
then renamed. A bucket shows an object only when it is complete, so there the content is written in place.
"""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ieg_jax.errors import StorageError, UserError, first_line

Path = epath.Path | pathlib.Path


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path has a scheme, such as `gs://bucket/run`."""
    return "://" in str(path)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and replaces one that is there already.

    Args:
      path: the file, in a folder that exists.
      content: bytes, or a text that is written as UTF-8, with surrogate escapes as the bytes that they stand for.

    Raises:
      StorageError: where it cannot be written; what was there before is intact.
    """
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with complete_or_absent(path) as place:
        place.write_bytes(content)


def inert(cell: Any) -> Any:
    """A cell of a table as a spreadsheet shows it: one that would be a formula there gets a ' in front.

    A program that opens a .csv file may run what begins with =, +, - or @, and a class or a file can be called so.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Writes a JSON file that ends with a line break; see `write`."""
    write(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: for a file that is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is damaged ({error}); restore it or use another folder") from None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = True) -> None:
    """Writes an .npz file; see `write`."""
    content = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    write(path, content.getvalue())


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a place to write content to bit by bit; it becomes `path` when the context ends.

    After an error, what was written so far is removed.

    Raises:
      StorageError: in place of an OSError. Errors of other kinds are passed on.
    """
    # The number of the process keeps two processes that write the same file from writing into each other's part.
    place = path if is_remote(path) else path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield place
        if place != path:
            place.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {first_line(error)}") from error
    finally:
        if place != path:
            with contextlib.suppress(OSError):  # after a success it has been renamed, and there is nothing to remove
                place.unlink()
