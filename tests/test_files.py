import os
import subprocess
import sys
import tempfile
import textwrap
import types

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from ieg_jax import files
from ieg_jax.errors import StorageError


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_parquet_is_read_without_threads(tmp_path):
    """A thread that holds an object of Python when Python ends would abort the process (SIGABRT, after its work)."""
    parquet.write_table(pyarrow.table({"a": list(range(1000)), "b": ["x"] * 1000}), tmp_path / "t.parquet")
    program = textwrap.dedent(
        """
        import io, os, pathlib, sys
        import pyarrow.parquet, pyarrow.dataset
        from ieg_jax import files
        content = pathlib.Path(sys.argv[1]).read_bytes()
        before = set(os.listdir("/proc/self/task"))
        assert files.read_parquet(content, ["a"]).column_names == ["a"]
        assert files.read_parquet(io.BytesIO(content)).num_rows == 1000
        print(len(set(os.listdir("/proc/self/task")) - before))
        """
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "t.parquet"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_storage_errors_while_another_thread_imports_tensorflow(monkeypatch):
    """The thread that says that a run lives asks for them then."""
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    assert files.storage_errors() == (OSError,)


def test_a_large_array_is_in_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "IN_MEMORY", 39)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not isinstance(files.scratch((3, 3), np.float32), np.memmap)
    found = files.scratch((2, 5), np.float32)
    found[1, 2] = 3
    assert isinstance(found, np.memmap) and found.dtype == np.float32 and found.sum() == 3
    assert list(tmp_path.iterdir()) == [], "it has no name, and goes with the array"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="no room for 0.0 GiB in .*absent.*TMPDIR"):
        files.scratch((2, 5), np.float32)


def test_arrays_are_written_whole_or_not_at_all(tmp_path):
    files.write_arrays(tmp_path / "a.npz", {"a": np.arange(3)}, compressed=False)

    class Full:
        def __array__(self, *_, **__):
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        files.write_arrays(tmp_path / "a.npz", {"a": np.arange(4), "b": Full()}, compressed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert files.read_arrays(tmp_path / "a.npz")["a"].tolist() == [0, 1, 2]


def test_parquet_by_row_groups(tmp_path):
    parquet.write_table(pyarrow.table({"a": [1, 2, 3], "b": ["x", "y", "z"]}), tmp_path / "t.parquet", row_group_size=2)
    with (tmp_path / "t.parquet").open("rb") as stream:
        groups = [group.to_pydict() for group in files.parquet_groups(stream, ["b"])]
    assert groups == [{"b": ["x", "y"]}, {"b": ["z"]}]
