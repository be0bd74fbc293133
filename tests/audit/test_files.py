"""The tables of an audit."""

import csv

import numpy as np
from pyarrow import parquet

from ieg_jax.audit.files import TABLE, TABLE_CSV, write_tables


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
