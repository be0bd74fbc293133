import os
import subprocess
import sys
import textwrap
import types

import pyarrow
import pytest
from pyarrow import parquet

from ieg_jax import files


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
