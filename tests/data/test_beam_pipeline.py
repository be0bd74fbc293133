"""Records that a pipeline of Apache Beam writes are those that the command writes without it."""

import functools
import json
import subprocess
import sys

import image_trees
import pytest
from runs import ROOT

from configs import default
from ieg_jax.data import beam_pipeline, shards
from ieg_jax.data.sources import load as sources
from ieg_jax.errors import UserError

SHARDS = 4 + 1 + 1  # of 12 training images 3 each, of 2 for testing, of 2 trusted ones
prepare = functools.partial(shards.prepare, examples_per_shard=3)


@pytest.fixture
def config(tmp_path):
    for label in ("cat", "dog"):
        for number in range(6):
            image_trees.save(tmp_path / "photos" / label / f"é {number}.png", image_trees.picture(number))
        for part in ("test", "trusted"):
            image_trees.save(tmp_path / part / label / "x.jpg", image_trees.picture(7))
    (tmp_path / "photos" / "dog" / "broken.png").write_bytes(b"hello")
    (tmp_path / "photos" / "dog" / "é 5.png").unlink()
    config = default.get_config()
    config.data.name, config.data.train = "image_folder", str(tmp_path / "photos")
    config.data.test, config.data.trusted = str(tmp_path / "test"), str(tmp_path / "trusted")
    config.data.unreadable = "skip"
    return config


@pytest.fixture
def whole(config, tmp_path):
    """What the command writes without Beam."""
    assert prepare(config, tmp_path / "whole")["images"] == {"train": 11, "test": 2, "trusted": 2}
    return tmp_path / "whole"


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions of `shards` that were called, those that write and that verify."""
    found = []

    def call(name, function, *arguments):
        found.append(name)
        return function(*arguments)

    for name in ("_write_shard", "_verify"):
        monkeypatch.setattr(shards, name, functools.partial(call, name, getattr(shards, name)))
    return found


def is_refused(folder):
    config = default.get_config()
    config.data.name, config.data.dir = "records", str(folder)
    with pytest.raises(UserError, match="holds no records"):
        sources.load(config.data)
    return True


# ---- without Beam ----


def test_tasks_settled_in_any_order_and_twice_make_the_same_files(config, whole, tmp_path, calls):
    def write(written, out):
        sent = beam_pipeline.send(written, out)
        assert len(set(sent)) == len(sent) == SHARDS
        for file in sent[::-1] + sent:  # a runner may give an element to two workers
            assert beam_pipeline.settle_sent(file) is None
        assert is_refused(out)
        for file in sent:
            (out / "parts" / file).unlink()

    prepare(config, tmp_path / "records", write=write)
    image_trees.assert_same_files(tmp_path / "records", whole)
    assert sorted(calls) == ["_verify"] * SHARDS + ["_write_shard"] * SHARDS


def test_a_task_that_is_sent_has_all_that_the_shard_needs(config, tmp_path):
    written = shards.list_shards(config, 3, resize=20)
    (tmp_path / "parts").mkdir()
    file = beam_pipeline.send(written, tmp_path)[3]
    assert json.loads((tmp_path / "parts" / "train-00003.task").read_text()) == {
        "split": "train",
        "number": 3,
        "file_name": "photos-train.tfrecord-00003-of-00004",
        "resize": 20,
        "paths": [str(tmp_path / "photos" / "dog" / f"é {number}.png") for number in (2, 3, 4)],
        "names": ["dog/é 2.png", "dog/é 3.png", "dog/é 4.png"],
        "labels": [1, 1, 1],
        "clean_labels": [-1, -1, -1],
        "given_labels": [-1, -1, -1],
        "ids": [9, 10, 11],
    }
    assert file == str(tmp_path / "parts" / "train-00003.task")


def test_a_shard_that_reads_back_differently_gets_no_name(config, whole, tmp_path, monkeypatch):
    hashes = shards._verify
    monkeypatch.setattr(shards, "_verify", lambda shard, wanted: hashes(shard, wanted[::-1]))
    with pytest.raises(UserError, match="reads back differently"):
        prepare(config, tmp_path / "records")
    assert not list((tmp_path / "records").glob("*.tfrecord*")) and is_refused(tmp_path / "records")
    monkeypatch.undo()
    prepare(config, tmp_path / "records")
    image_trees.assert_same_files(tmp_path / "records", whole)


def test_what_dataflow_cannot_reach(config, tmp_path):
    with pytest.raises(UserError, match="records: Dataflow's workers do not see this disk; expected a folder gs://"):
        beam_pipeline.writer("DataflowRunner", [], tmp_path / "records")
    write = functools.partial(beam_pipeline._write, "DataflowRunner", None)
    with pytest.raises(UserError, match="the train images are on this disk .*cat/é 0.png.* --runner=DirectRunner"):
        prepare(config, tmp_path / "records", write=write)


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    for runner, out in (("DirectRunner", "records"), ("DataflowRunner", "gs://bucket/records")):
        with pytest.raises(UserError, match=rf"^--runner={runner} needs the package apache-beam: .*'ieg_jax\[beam\]'$"):
            beam_pipeline.writer(runner, [], out)


def test_options_need_a_runner(tmp_path):
    command = [sys.executable, "-m", "ieg_jax.data.prepare", "--config=configs/default.py", f"--out={tmp_path}/x"]
    done = subprocess.run([*command, "--beam_options=region=x,a"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: --beam_options=region=x,a: needs --runner, DirectRunner or DataflowRunner\n"


# ---- with Beam ----


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason="apache-beam is not installed: the extra [beam]")


def test_the_direct_runner_writes_the_same_files(beam, config, whole, tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = prepare(config, "records", write=beam_pipeline.writer("DirectRunner", [], "records"))
    assert result["left_out"].keys() == {"dog/broken.png"}
    image_trees.assert_same_files(tmp_path / "records", whole)
    assert sorted(calls) == ["_verify"] * SHARDS + ["_write_shard"] * SHARDS


def test_a_pipeline_that_fails_is_gone_on_with(beam, config, whole, tmp_path, calls, monkeypatch):
    settle = shards.settle

    def settle_or_fail(task, out):
        if task.number == 2:
            raise OSError("no power")
        settle(task, out)

    monkeypatch.setattr(beam_pipeline, "settle", settle_or_fail)
    with pytest.raises(Exception, match="no power"):
        prepare(config, tmp_path / "records", write=beam_pipeline.writer("DirectRunner", [], "records"))
    assert is_refused(tmp_path / "records")
    already = calls.count("_write_shard")
    assert already < SHARDS
    prepare(config, tmp_path / "records")
    assert calls.count("_write_shard") == SHARDS, "what was finished is not written again"
    left = {file.name for file in (tmp_path / "records" / "parts").glob("*.task")}
    for name in left:
        (tmp_path / "records" / "parts" / name).unlink()
    image_trees.assert_same_files(tmp_path / "records", whole)


@pytest.mark.parametrize("ends", ["interrupted", "CANCELLED"])
def test_a_job_that_is_stopped(beam, config, tmp_path, ends):
    class Job:
        cancelled = 0

        def wait_until_finish(self):
            if ends == "interrupted":
                raise KeyboardInterrupt
            return ends

        def cancel(self):
            self.cancelled += 1

    class Runner(beam.runners.PipelineRunner):
        job = Job()

        def run_pipeline(self, pipeline, options):
            return self.job

    write = functools.partial(beam_pipeline._write, "DirectRunner", beam.Pipeline(runner=Runner()))
    with pytest.raises(KeyboardInterrupt if ends == "interrupted" else UserError) as raised:
        prepare(config, tmp_path / "records", write=write)
    if ends == "CANCELLED":
        assert "the pipeline ended as CANCELLED; the same command goes on" in str(raised.value)
    assert Runner.job.cancelled == (ends == "interrupted")
    assert is_refused(tmp_path / "records")


@pytest.mark.parametrize(
    "runner, options, message",
    [
        ("DirectRunner", ["direct_num_worker=2"], "knows no direct_num_worker"),
        ("DirectRunner", ["direct_num_workers=two"], "direct_num_workers=two: argument .*invalid int value: 'two'"),
        ("DataflowRunner", ["region=x"], "project|apache_beam\\[gcp\\]"),
    ],
)
def test_options_that_cannot_work(beam, runner, options, message):
    with pytest.raises(UserError, match=message):
        beam_pipeline.writer(runner, options, "gs://bucket/records")
