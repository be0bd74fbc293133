"""How fast images are read from a bucket, and what they cost: records on the emulated bucket of the tests.

    python -m benchmarks.bucket

writes 600 JPEGs of 320 × 320 pixels and records of them to a bucket on loopback (`tests/bucket.py`), and reads batches
as training does, decoded to 224 pixels, without latency and with 50 ms. Then a small network trains in a work folder on
a disk and on the bucket, and logs every tenth step: what a step waits for the log and for checkpoints. Server and
reader share the processors.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import bucket as buckets

COUNTS = {"train": 600, "trusted": 20}
LATENCIES = (0.0, 0.05)  # seconds
READER = """
import time
from configs import own_data
from ieg_jax import config as config_lib
from ieg_jax import methods
from ieg_jax.data.batches import train_batches
from ieg_jax.data.load import load_data
from ieg_jax.runtime import mesh

config = own_data.get_config("backbone=none,method=supervised")
config.data.name, config.data.dir, config.data.image_size = "records", "gs://bucket/records", 0
config.augment.standard, config.augment.strong = "random_resized_crop(224)|flip", ""
config.augment.evaluation = "resize(256)|center_crop(224)"
config.trusted.source, config.batch_size, config.mesh.data = "separate", 32, 1
data = load_data(config)
config = config_lib.resolve(config, data.facts)
streams = methods.get("supervised").streams
batches = train_batches(config, data, streams, 0, 10**6, mesh.create(config).batch)
next(batches)
start, count = time.monotonic(), 0
while time.monotonic() - start < 12:
    next(batches)
    count += 32
print(f"{count / (time.monotonic() - start):.0f} images/s, {count} images")
"""


def waits(environment: dict[str, str], workdir: str, rows: Callable[[], str | bytes]) -> str:
    """Trains, and tells what a step waited for the log and for checkpoints, in all and at the most."""
    keys = {"num_train_steps": 1000, "log_every_steps": 10, "checkpoint_every_steps": 250, "eval_every_steps": 1000}
    flags = [f"--config.{key}={value}" for key, value in (keys | {"mesh.data": 1, "audit.epochs": 0.0}).items()]
    command = [sys.executable, "-m", "ieg_jax.main", "--config=configs/quickstart.py:method=supervised", *flags]
    subprocess.run([*command, f"--workdir={workdir}"], env=environment, check=True, capture_output=True)
    logged = [json.loads(line) for line in rows().splitlines()]
    told = []
    for part in ("metrics", "checkpoint"):
        seconds = [10 * row[f"time/{part}"] for row in logged if f"time/{part}" in row]
        told.append(f"{part} {sum(seconds):.2f} s in {len(seconds)} rows, {max(seconds):.2f} s at the most")
    return "; ".join(told)


def main() -> None:
    """Prints a line for each latency."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, buckets.Bucket() as bucket, buckets.environment(bucket) as variables:
        for part, count in COUNTS.items():
            for number in range(count):
                file = pathlib.Path(folder, part, "ab"[number % 2], f"{number}.jpg")
                file.parent.mkdir(parents=True, exist_ok=True)
                small = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
                small.resize((320, 320), Image.Resampling.BILINEAR).save(file, quality=92)
        sizes = [file.stat().st_size for file in pathlib.Path(folder).rglob("*.jpg")]
        print(f"JPEGs of {np.mean(sizes) / 1e3:.0f} kB")
        environment = os.environ | variables | {"JAX_PLATFORMS": "cpu"}
        flags = {"data.name": "image_folder", "data.image_size": 0}
        flags |= {f"data.{part}": f"{folder}/{part}" for part in COUNTS}
        command = [sys.executable, "-m", "ieg_jax.data.prepare", "--config=configs/own_data.py:backbone=none"]
        command += [f"--config.{key}={value}" for key, value in flags.items()]
        subprocess.run([*command, "--out=gs://bucket/records"], env=environment, check=True, capture_output=True)
        for bucket.latency in LATENCIES:
            bucket.requests.clear()
            bucket.bytes_out = 0
            done = subprocess.run(
                [sys.executable, "-c", READER], env=environment, check=True, capture_output=True, text=True
            )
            told = done.stdout.strip().splitlines()[-1]
            print(f"{bucket.latency * 1e3:.0f} ms: {told}, {dict(bucket.requests)}, {bucket.bytes_out / 1e6:.0f} MB")
        place = pathlib.Path(folder, "run")
        told = waits(environment, str(place), lambda: (place / "metrics.jsonl").read_text())
        print(f"a work folder on a disk: {told}")
        for bucket.latency in LATENCIES:
            name = f"run-{bucket.latency}"
            told = waits(environment, f"gs://bucket/{name}", lambda: bucket.objects[f"bucket/{name}/metrics.jsonl"])  # noqa: B023
            print(f"on a bucket, {bucket.latency * 1e3:.0f} ms: {told}")


if __name__ == "__main__":
    main()
