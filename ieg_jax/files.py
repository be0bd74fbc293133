"""Writes files so that they appear whole or not at all, on a disk or on a bucket.

Whoever reads a file while it is written, or after the writer was killed, finds the old content or the new content and
never a part of it. On a disk the content is first written to `<name>.<process>-<random>.partial` beside the file, and
this is then renamed. A bucket shows an object only when it is complete.
"""

import contextlib
import io
import json
import os
import pathlib
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from etils import epath

from ieg_jax.errors import StorageError, UserError, first_line

if TYPE_CHECKING:
    import pyarrow

Path = epath.Path | pathlib.Path

IN_MEMORY = 2**30  # bytes of an array that are held in memory; see `scratch`


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path has a scheme, such as `gs://bucket/run`."""
    return "://" in str(path)


def storage_errors() -> tuple[type[Exception], ...]:
    """What is raised where a file cannot be read or written: TensorFlow's errors, of buckets, are no OSErrors.

    To be called where the error is caught, `except storage_errors() as error`: by then TensorFlow is loaded, if its
    errors are among those that come.
    """
    errors = getattr(sys.modules.get("tensorflow"), "errors", None)  # None too while another thread imports it
    return (OSError,) if errors is None else (OSError, errors.OpError)


def place(path: epath.PathLike) -> epath.Path:
    """A path that somebody has typed, local or on a bucket."""
    return epath.Path(path).expanduser()


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that holds whatever becomes the working directory; one with a scheme does as it is.

    `resolve` would make a folder called `gs:` of it.
    """
    return epath.Path(path) if is_remote(path) else place(path).resolve()


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and replaces one that is there already.

    Args:
      path: the file, in a folder that exists.
      content: bytes, or a text that is written as UTF-8, with surrogate escapes as the bytes that they stand for.

    Raises:
      StorageError: where it cannot be written; what was there before is intact.
    """
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with complete_or_absent(path) as part:
        part.write_bytes(content)


def inert(cell: Any) -> Any:
    """A cell of a table as a spreadsheet shows it: one that would be a formula there gets a ' in front.

    A program that opens a .csv file may run what begins with =, +, - or @, and a class or a file can be called so.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled.

    Raises:
      OSError, ValueError, zipfile.BadZipFile: where it is missing or damaged.
    """
    with opened(path) as stream, np.load(stream, allow_pickle=False) as content:
        return dict(content)


def opened(path: Path) -> BinaryIO:
    """A file, to be read in any order; of a bucket it is read whole at once, for libraries want many small parts."""
    return io.BytesIO(path.read_bytes()) if is_remote(path) else path.open("rb")


def read_parquet(content: bytes | BinaryIO, columns: Sequence[str] | None = None) -> "pyarrow.Table":
    """The table in a Parquet file, read in this thread alone.

    `parquet.read_table` reads by threads of its own. Where one of them still holds an object of Python when Python
    ends, as a file object or bytes, the process is aborted after its work is done.

    Args:
      content: of the file. A name is not taken: pyarrow would make columns of folders named a=b.
      columns: the names of those to read; None = all.

    Raises:
      pyarrow.ArrowException: where it is no such file.
    """
    from pyarrow import parquet

    source = io.BytesIO(content) if isinstance(content, bytes) else content
    with parquet.ParquetFile(source, pre_buffer=False) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False)


def parquet_groups(source: BinaryIO, columns: Sequence[str]) -> Iterator["pyarrow.Table"]:
    """A Parquet file by its row groups, so that one of them at a time is in memory; see `read_parquet`."""
    from pyarrow import parquet

    with parquet.ParquetFile(source, pre_buffer=False) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=list(columns), use_threads=False)


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
    """Writes an .npz file, array by array; see `write`."""
    with complete_or_absent(path) as part, part.open("wb") as stream:
        (np.savez_compressed if compressed else np.savez)(stream, **arrays)


def scratch(shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
    """An array to be filled; of more than IN_MEMORY bytes one in a file without a name, which goes with the array.

    What is in it then need not be in memory all at once. The file is in the folder for temporary files, TMPDIR, which
    must have the room, and must itself be on a disk.

    Raises:
      StorageError: where there is no such folder, or no room in it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            # Room is asked for now: a page of a mapped file that finds none later would end the process.
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise StorageError(
            f"no room for {size / 2**30:.1f} GiB in {tempfile.gettempdir()} ({first_line(error)}); set TMPDIR to a "
            f"folder on a disk that has it"
        ) from error


@contextlib.contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a place to write content to bit by bit; it becomes `path` when the context ends.

    After an error, what was written so far is removed. What is to be on a bucket is a file of this machine until then.

    Raises:
      StorageError: in place of an OSError and of TensorFlow's errors. Errors of other kinds are passed on.
    """
    try:
        if is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                here = epath.Path(folder) / path.name
                yield here
                here.copy(path, overwrite=True)
            return
        # So two processes that write the same file do not write into each other's part; in containers on one shared
        # disk all may have the number 1.
        part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            yield part
            part.replace(path)
        finally:
            with contextlib.suppress(OSError):  # after a success it has been renamed, and there is nothing to remove
                part.unlink()
    except storage_errors() as error:
        raise StorageError(f"{path} cannot be written: {first_line(error)}") from error
