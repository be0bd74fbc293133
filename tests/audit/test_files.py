"""The tables of an audit."""

import csv

import numpy as np
from pyarrow import parquet

from ieg_jax.audit import files
from ieg_jax.audit.files import TABLE, TABLE_CSV, to_cleanlab, write_cleanlab, write_tables


def test_formulas_are_made_harmless_where_a_person_looks_alone(tmp_path):
    names = np.array(["=HYPERLINK(1)", "-b", "c"], object)
    columns = {"id": np.arange(3), "given_label": names, "p_right": np.array([-0.5, 0.5, np.nan]), "mean_trust": None}
    for spreadsheet in (False, True):
        write_tables(tmp_path, columns, np.eye(3, dtype=np.float32), list(names), spreadsheet)
        with (tmp_path / TABLE_CSV).open(newline="") as file:
            rows = list(csv.DictReader(file))
        mark = "'" if spreadsheet else ""
        assert [row["given_label"] for row in rows] == [f"{mark}=HYPERLINK(1)", f"{mark}-b", "c"]
        assert [row["p_right"] for row in rows] == ["-0.5", "0.5", ""]
        assert parquet.read_table(tmp_path / TABLE)["given_label"].to_pylist() == list(names), "for programs, as it is"


def test_row_groups_are_the_table(tmp_path, monkeypatch):
    """In groups of two rows; what a spreadsheet and a program read does not depend on them."""
    names = np.array(["a", "=b", "c\udcff", "d", "e"], object)
    columns = {"id": np.arange(5), "given_label": names, "p_right": np.linspace(0, 1, 5), "mean_trust": None}
    probabilities = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    found = []
    for rows in (files.GROUP_ROWS, 2):
        monkeypatch.setattr(files, "GROUP_ROWS", rows)
        write_tables(tmp_path, columns, probabilities, ["x", "y", "z"], spreadsheet=True)
        found.append((parquet.read_table(tmp_path / TABLE).to_pydict(), (tmp_path / TABLE_CSV).read_bytes()))
    assert parquet.ParquetFile(tmp_path / TABLE).num_row_groups == 3
    assert found[0] == found[1]
    assert found[0][0]["probability:y"] == probabilities[:, 1].tolist() and found[0][0]["given_label"][2] == "c\ufffd"


def test_cleanlab_gets_rows_that_sum_to_one(tmp_path):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(7), 50).astype(np.float32)
    write_cleanlab(tmp_path, np.arange(50, dtype=np.int32) % 7, probabilities)
    found = to_cleanlab(str(tmp_path))
    assert found["labels"].dtype == np.int64 and found["pred_probs"].dtype == np.float64
    np.testing.assert_allclose(found["pred_probs"].sum(1), 1, rtol=1e-14)
    np.testing.assert_allclose(found["pred_probs"], probabilities, rtol=1e-6)
