import json

import pytest

from configs import default
from ieg_jax.errors import UserError
from ieg_jax.runtime.workdir import WorkFolder, provenance


def test_rows_survive_a_line_cut_short_and_rewinding(tmp_path):
    folder = WorkFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append({"step": step, "loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    assert folder.rewind(2) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    folder.append({"step": 3, "loss": 9.0})
    assert [row["loss"] for row in folder.rows()] == [0.5, 1.0, 9.0]


def test_a_process_that_only_reads_writes_nothing(tmp_path):
    folder = WorkFolder(tmp_path, writes=False)
    assert folder.check(default.get_config()) is None
    folder.begin(default.get_config(), {"train": "abc"})
    folder.append({"step": 1})
    folder.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        WorkFolder(tmp_path).check(default.get_config())


def test_the_same_configuration_is_welcome(tmp_path):
    folder = WorkFolder(tmp_path)
    folder.begin(default.get_config(), {"train": "abc"})
    assert folder.check(default.get_config()) is None
    folder.write("result.json", {"steps": 3})
    assert folder.check(default.get_config()) == {"steps": 3}
    assert json.loads((tmp_path / "result.json").read_text()) == {"steps": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "data.json", "result.json"]


def test_provenance():
    found = provenance()
    assert found["versions"]["jax"]
    assert found["commit"] is None or len(found["commit"].removesuffix("+changes")) == 40


def test_other_data_than_the_run_began_with(tmp_path):
    folder = WorkFolder(tmp_path)
    folder.begin(default.get_config(), {"train": "abc", "test": "d"})
    folder.begin(default.get_config(), {"train": "abc", "test": "d"})
    with pytest.raises(UserError, match="begun with other data: its test and validation examples"):
        folder.begin(default.get_config(), {"train": "abc", "validation": "d"})


def test_rows_of_a_bucket_wait_for_a_checkpoint_or_a_minute(tmp_path, monkeypatch):
    monkeypatch.setattr("ieg_jax.files.is_remote", lambda path: True)
    folder, file = WorkFolder(tmp_path), tmp_path / "metrics.jsonl"
    folder.append({"step": 0})
    assert folder.rewind(0) == [{"step": 0}]
    for step in (1, 2):
        folder.append({"step": step})
    assert file.read_text() == '{"step": 0}\n'
    folder.flush()
    assert [row["step"] for row in folder.rows()] == [0, 1, 2]
    folder._written -= 61
    folder.append({"step": 3})
    assert [row["step"] for row in folder.rows()] == [0, 1, 2, 3]
    assert folder.rewind(1) == [{"step": 0}, {"step": 1}]
    folder.append({"step": 2})
    folder.flush()
    assert [row["step"] for row in WorkFolder(tmp_path).rows()] == [0, 1, 2], "what came after was forgotten"
