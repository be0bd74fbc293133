"""A work folder and data on a bucket: Google Cloud Storage on loopback, see tests/bucket.py."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import bucket as buckets
import image_trees
import numpy as np
import pytest
import runs
from compilation import FAST_COMPILATION
from PIL import Image

from ieg_jax import buckets as preparation
from ieg_jax import inference
from ieg_jax.errors import UserError

STEPS = 60
KEYS = runs.SMALL | {
    "num_train_steps": STEPS, "log_every_steps": 10, "eval_every_steps": 20, "checkpoint_every_steps": 10,
    "mesh.data": 1, "audit.epochs": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bucket():
    with buckets.Bucket() as made:
        yield made


@pytest.fixture(scope="module")
def environment(bucket):
    try:
        with buckets.environment(bucket) as made:
            yield (
                os.environ | made | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FAST_COMPILATION}
            )
    except OSError as error:  # the cache is on another disk than TensorFlow
        pytest.skip(f"TensorFlow cannot be copied by hard links: {error}")


def call(environment, module, *arguments, status=0):
    """Runs a command; returns what it printed."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(workdir, keys=KEYS):
    return runs.main_arguments("configs/quickstart.py:method=l2r", workdir, keys)


def rows(bucket, name):
    lines = bucket.objects[f"{name}/metrics.jsonl"].decode().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(runs.TIMINGS)} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """The same run on a disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    call(environment, "ieg_jax.main", *train(folder / "run")[2:])
    inference.export(inference.load(folder / "run"), folder / "weights")
    return folder


@pytest.fixture(scope="module")
def killed_and_resumed(bucket, environment, tmp_path_factory):
    """Killed (-9) behind a checkpoint whose mark then is missing, and started again where every tenth answer fails."""
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *train("gs://bucket/run")], cwd=runs.ROOT, env=environment, stdout=output, stderr=output
        )
    newest = "bucket/run/checkpoints/30/commit_success.txt"
    deadline = time.monotonic() + 200
    while newest not in bucket.objects:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = {int(name.split("/")[3]) for name in bucket.objects if name.endswith("/commit_success.txt")}
    for step in {step for step in steps if step >= 30}:
        bucket.remove(f"bucket/run/checkpoints/{step}/commit_success.txt")
    assert 20 in steps
    bucket.failures = [("upload/", 503, 2), ("GET /storage", 503, 1), ("tree/", 429, 2), ("metrics.jsonl", 503, 1)]
    return call(environment, "ieg_jax.main", *train("gs://bucket/run")[2:])


def test_a_killed_run_goes_on_there_as_if_nothing_had_happened(bucket, environment, killed_and_resumed, undisturbed):
    assert "goes on from the checkpoint at step 20" in killed_and_resumed, "30 has its name and is not complete"
    assert bucket.requests["failed"] >= 4
    assert rows(bucket, "bucket/run") == runs.rows(undisturbed / "run")
    call(environment, "ieg_jax.export", "--workdir=gs://bucket/run", "--out=gs://bucket/weights")
    found = np.load(io.BytesIO(bucket.objects["bucket/weights/weights.npz"]))
    wanted = np.load(undisturbed / "weights" / "weights.npz")
    assert sorted(found) == sorted(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert "bucket/run/running.json" not in bucket.objects
    assert not (runs.ROOT / "gs:").exists()


@pytest.mark.slow
def test_audit_and_predictions_there(bucket, environment, killed_and_resumed):
    told = call(
        environment, "ieg_jax.audit", "--workdir=gs://bucket/run", "--out=gs://bucket/audit", "--force", "--views=1"
    )
    assert "open gs://bucket/audit/audit.html" in told
    files = {name.removeprefix("bucket/audit/") for name in bucket.objects if name.startswith("bucket/audit/")}
    assert {"audit.html", "labels.csv", "labels.parquet", "cleaned.csv", "summary.json", "cleanlab.npz"} <= files
    image = io.BytesIO()
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(image, "PNG")
    for name in ("a", "b"):
        bucket.put(f"bucket/images/{name}.png", image.getvalue())
    call(
        environment,
        "ieg_jax.predict",
        "--workdir=gs://bucket/run",
        "gs://bucket/images",
        "--out=gs://bucket/predictions.csv",
    )
    lines = bucket.objects["bucket/predictions.csv"].decode().splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "path",
        "gs://bucket/images/a.png",
        "gs://bucket/images/b.png",
    ]


SLOW = 0.05  # seconds that an answer takes from another continent
RECORDS = {"photos": 12, "checked": 4}  # images


@pytest.fixture(scope="module")
def records(bucket, environment, tmp_path_factory):
    """Records made of images on this disk, and there of those there; the folder here."""
    folder = tmp_path_factory.mktemp("records")
    for part, count in RECORDS.items():
        for number in range(count):
            name = f"{part}/{'ab'[number % 2]}/{number}.png"
            image_trees.save(folder / name, image_trees.picture(number + 100 * (part == "checked"), (16, 16)))
            bucket.put(f"bucket/{name}", (folder / name).read_bytes())
    config = "--config=configs/own_data.py:source=image_folder,size=0,backbone=none"
    for place in (str(folder), "gs://bucket"):
        images = [f"--config.data.train={place}/photos", f"--config.data.trusted={place}/checked"]
        out = f"--out={place}/records"
        call(environment, "ieg_jax.data.prepare", config, *images, out, "--examples_per_shard=5")
    return folder


def test_records_of_images_there_are_those_of_images_here(bucket, records):
    here = {file.name: file.read_bytes() for file in (records / "records").glob("photos-train.*")}
    assert len(here) == 3
    for name, content in here.items():
        assert bucket.objects[f"bucket/records/{name}"] == content, name


@pytest.mark.slow
def test_training_from_records_there_is_training_from_records_here(bucket, environment, records):
    """Though answers are slow; and what is fetched is the records a few times, not 64 MB for each file."""
    keys = runs.SMALL | {
        "num_train_steps": 6, "log_every_steps": 2, "eval_every_steps": 6, "checkpoint_every_steps": 6, "mesh.data": 1,
        "audit.epochs": 0.0, "data.name": "records", "trusted.source": "separate", "data.image_size": 0,
        "augment.standard": "random_resized_crop(8)|flip", "augment.evaluation": "resize(8)|center_crop(8)",
    }  # fmt: skip
    config, before = "configs/own_data.py:backbone=none,method=supervised", bucket.bytes_out
    bucket.latency = SLOW
    for place, workdir in ((str(records), records / "run"), ("gs://bucket", "gs://bucket/from_records")):
        arguments = runs.main_arguments(config, workdir, keys | {"data.dir": f"{place}/records"})
        call(environment, "ieg_jax.main", *arguments[2:])
    bucket.latency = 0.0
    assert rows(bucket, "bucket/from_records") == runs.rows(records / "run")
    assert bucket.bytes_out - before < 10e6


REFUSED = {
    "gs://bucket/forbidden": ([("upload/", 403, 10**6)], "work folder gs://bucket/forbidden cannot be written: .*403"),
    "gs://nowhere/run": ([], "gs://nowhere: there is no such bucket"),
    "gs://bucket/hidden": (
        [("GET /storage/v1/b/bucket?", 403, 10**6)],
        "gs://bucket: not allowed .*legacyBucketReader",
    ),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[pytest.mark.slow] if "hidden" in place else []) for place in REFUSED]
)
def test_what_a_bucket_refuses_is_one_line(bucket, environment, place):
    bucket.failures, message = REFUSED[place]
    told = call(environment, "ieg_jax.main", *train(place)[2:], status=1)
    bucket.failures = []
    assert re.match(f"error: {message}", told.strip().splitlines()[-1]), told


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"google-cloud-storage.*pip install 'ieg_jax\[gcs\]'"):
        preparation.prepare([])
