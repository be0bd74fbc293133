"""Weights & Biases: with a stand-in for the package, and with the package itself, offline."""

import importlib.machinery
import importlib.util
import json
import shutil
import struct
import sys
import types

import jax
import numpy as np
import pytest

from configs import default
from ieg_jax.errors import UserError
from ieg_jax.runtime.workdir import WorkFolder
from ieg_jax.train import check, tracking
from ieg_jax.train.loop import train_and_evaluate


class StandIn(types.ModuleType):
    """What the package offers, as far as it is used; notes everything."""

    Image, Histogram = staticmethod(lambda image: ("image", image)), staticmethod(lambda array: ("histogram", array))

    def __init__(self, starting_step=0, breaks_at=10**9, refuses=None, logged_in=True):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="stand-in")
        self.starting_step, self.breaks_at, self.refuses, self.logged_in = starting_step, breaks_at, refuses, logged_in
        self.begun, self.rows, self.finished, self.offline, self.dir = [], [], 0, True, "/there/files"
        self.config = types.SimpleNamespace(update=lambda content, **_: self.begun[-1].update(config=content))

    def Settings(self, **settings):
        return settings

    def login(self, prompt, verify):
        assert not prompt and not verify
        return self.logged_in

    def init(self, **arguments):
        if self.refuses:
            raise self.refuses
        self.begun.append(arguments)
        return self

    def log(self, row, step):
        if step >= self.breaks_at:
            raise BrokenPipeError("no wandb-core")
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


@pytest.fixture
def installed(monkeypatch):
    def install(**arguments):
        package = StandIn(**arguments)
        monkeypatch.setitem(sys.modules, "wandb", package)
        return package

    return install


class Listener:
    def __init__(self):
        self.warnings, self.said = [], []
        self.warn, self.say = self.warnings.append, self.said.append


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"project": "a/b/c"}, "wandb.project: got 'a/b/c', expected a project or team/project"),
        ({"project": "team/"}, "wandb.project: got 'team/'"),
        ({"project": "50%"}, "wandb.project: got '50%'.*without any of"),
        ({"project": "p", "mode": "offlin"}, "wandb.mode: got 'offlin', expected one of .* Did you mean 'offline'"),
        ({"name": "n"}, "wandb.name='n', but wandb.project is ''"),
        ({"mode": "offline"}, "wandb.mode='offline', but wandb.project is ''"),
    ],
)
def test_keys_that_cannot_work(keys, message, installed):
    installed()
    config = default.get_config()
    config.wandb.update(keys)
    with pytest.raises(UserError, match=message):
        check.validate(config)


def test_the_package_is_missing(monkeypatch, tmp_path):
    """A folder named wandb, as the package leaves behind where it runs, is no package."""
    config = default.get_config()
    config.wandb.project = "team/labels"
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        UserError, match=r"wandb.project='team/labels', but wandb is not installed: pip install 'ieg_ja"
    ):
        tracking.validate(config)
    config.wandb.project = ""
    tracking.validate(config)


def test_nobody_is_logged_in(installed, monkeypatch):
    installed(logged_in=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = default.get_config()
    tracking.check_login(config)
    config.wandb.project = "labels"
    with pytest.raises(UserError, match="nobody is logged in to W&B: run `wandb login`"):
        tracking.check_login(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.check_login(config)
    config.wandb.mode = "online"
    with pytest.raises(UserError, match="nobody is logged in"):
        tracking.check_login(config)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tracking.check_login(config)


def test_begin_and_go_on(installed, monkeypatch, tmp_path):
    package, config, listener = installed(), default.get_config(), Listener()
    folder = WorkFolder(tmp_path)
    assert tracking.start(config, folder, False, listener) is None
    config.wandb.project = "team/labels"
    for name in ("", "mine"):
        config.wandb.name = name
        assert tracking.start(config, folder, bool(name), listener) is not None
    first, second = package.begun
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["entity"], first["project"], first["name"], first["mode"]) == ("team", "labels", tmp_path.name, None)
    assert (first["resume"], first["dir"], second["name"]) == ("allow", str(tmp_path), "mine")
    assert first["config"]["schedule.base_lr"] == 0.1 and first["config"]["wandb.project"] == "team/labels"
    assert listener.said == ["for `wandb sync`: /there"] * 2

    installed(refuses=RuntimeError("no such team\nmore"))
    with pytest.raises(UserError, match="wandb.project='team/labels': W&B said RuntimeError: no such team; set"):
        tracking.start(config, folder, False, listener)
    assert tracking.start(config, folder, True, listener) is None
    assert listener.warnings == ["goes on without W&B: RuntimeError: no such team"]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert tracking.start(config, folder, False, listener) is None


def test_an_error_ends_the_writing_and_nothing_else(installed):
    package, listener = installed(starting_step=3, breaks_at=5), Listener()
    tracker = tracking.Tracker(package, package, listener.warn)
    for step in (2, 3, 4, 5, 6):
        tracker.write_scalars(step, {"loss": float(step)})
    assert package.rows == [(3, {"loss": 3.0}), (4, {"loss": 4.0})], "step 2 is there from before a restart"
    tracker.close()
    assert listener.warnings == ["nothing more is written to W&B: BrokenPipeError: no wandb-core"]
    assert package.finished == 0

    tracker = tracking.Tracker(package, package, listener.warn)
    tracker.write_images(3, {"suspects": np.zeros((2, 2, 3), np.uint8)})
    tracker.write_histograms(3, {"weight": np.zeros(2)}, None)
    assert [list(row) for _, row in package.rows[2:]] == [["suspects"], ["weight"]]
    assert [kind for _, row in package.rows[2:] for kind, _ in row.values()] == ["image", "histogram"]
    tracker.close()
    tracker.close()
    assert package.finished == 1


def test_a_run_whose_service_dies(installed, tiny_config, tmp_path, caplog):
    package = installed(breaks_at=4)
    tiny_config.method.name, tiny_config.wandb.project = "l2r", "labels"
    result = train_and_evaluate(tiny_config, str(tmp_path), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    written = {}
    for step, row in package.rows:
        assert step == 2
        written |= row
    assert result["steps"] == 4 and [row["step"] for row in rows] == [2, 4]
    assert written.pop("weight/relative")[0] == "histogram" and written.pop("suspects")[0] == "image"
    assert written == {name: value for name, value in rows[0].items() if name != "step"}
    assert "nothing more is written to W&B: BrokenPipeError" in caplog.text


def records(folder):
    """The records of a .wandb file, a log of blocks of 32 KiB (as LevelDB's), after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder):
    """Step -> key -> value, as JSON."""
    found = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found[row.pop("_step")] = row
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_with_the_package_offline(tiny_config, tmp_path, monkeypatch):
    """What is in its files is what is in metrics.jsonl; a second start goes on under the same id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_config.method.name, tiny_config.wandb.project = "l2r", "labels"
    train_and_evaluate(tiny_config, str(tmp_path), quiet=True)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train_and_evaluate(tiny_config, str(tmp_path), quiet=True)

    runs = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime)
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(runs) == 2 and all(run_id in folder.name for folder in runs)
    first, second = map(history, runs)
    assert sorted(first) == [2, 4] and list(second) == [4]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for written, row in ((first[2], rows[0]), (second[4], rows[1])):
        assert {name: written[name] for name in row if name != "step"} == pytest.approx(
            {name: value for name, value in row.items() if name != "step"}
        )
        assert (written["weight/relative/_type"], written["suspects/_type"]) == ("histogram", "image-file")
        assert list(tmp_path.glob(f"wandb/*/files/{written['suspects/path']}"))
    sent = {}
    for record in records(runs[0]):
        for update in (*record.run.config.update, *record.config.update):
            sent["/".join(update.nested_key) or update.key] = update.value_json
    assert (sent["method.name"], sent["noise.rate"], sent["num_train_steps"]) == ('"l2r"', "0.4", "4")
    assert next(record.run for record in records(runs[0]) if record.run.run_id).project == "labels"
