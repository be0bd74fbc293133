"""What grows with the number of examples: seconds and memory of loading, a first batch, a checkpoint and an audit.

    python -m benchmarks.scale --n=1000000
    python -m benchmarks.scale --n=100000 --classes=1000 --rows=audit

Features of --dimensions normal numbers, with labels of which a fifth is wrong, are written to an .npz file, and read
as a run reads them. The audit is of probabilities that are drawn too, softmax of logits in which the true class stands
out; their pieces are written beforehand, as `ieg_jax.audit --part` writes them. Each kind of row is measured in a
process of its own; `peak` is the most memory that it held (VmHWM), `before` what it held when the row began, libraries
included. Linux alone.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import contextlib
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath

from ieg_jax import files

ROWS = ("load", "batch", "checkpoint", "audit")
WRONG = 0.2  # share of the labels
SURE = 3.0  # by which the logit of the true class stands out, besides log K


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_integer("n", 1_000_000, "Examples.")
    flags.DEFINE_integer("classes", 10, "Classes.")
    flags.DEFINE_integer("dimensions", 8, "Numbers of an example.")
    flags.DEFINE_list("rows", list(ROWS), "What is measured.")
    flags.DEFINE_string("folder", "", "For the files; '' = a temporary one, which is removed.")
    flags.DEFINE_string("only", "", "Used by the benchmark itself: the row of this process.")


@contextlib.contextmanager
def measured(name: str) -> Iterator[None]:
    """Prints seconds, and memory before and at its peak, of what happens inside."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before, start, processor = memory("VmRSS"), time.monotonic(), time.process_time()
    yield
    seconds, processor = time.monotonic() - start, time.process_time() - processor
    print(f"| {name} | {seconds:.2f} | {processor:.2f} | {before:,.0f} | {memory('VmHWM'):,.0f} |", flush=True)


def memory(field: str) -> float:
    """MiB of this process, a line of /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def drawn_labels(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """True and given labels, `[n]` int32 each."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, k, n, dtype=np.int32)
    wrong = rng.random(n, np.float32) < WRONG
    return true, np.where(wrong, (true + rng.integers(1, k, n, dtype=np.int32)) % k, true)


def drawn_predictions(true: np.ndarray, k: int, start: int) -> np.ndarray:
    """The probabilities `[n, K]` float32 of examples of these classes, the first of which is the `start`-th."""
    logits = np.random.default_rng([1, start]).standard_normal((len(true), k), np.float32)
    logits[np.arange(len(true)), true] += SURE + np.log(k)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def prepare(folder: pathlib.Path, n: int, k: int, dimensions: int) -> None:
    """Writes the file of features, with ten trusted examples of each class, of which two are held out."""
    true, given = drawn_labels(n, k)
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((k, dimensions), np.float32)

    def features(labels: np.ndarray) -> np.ndarray:
        return centres[labels] + rng.standard_normal((len(labels), dimensions), np.float32)

    trusted = np.repeat(np.arange(k, dtype=np.int32), 10)
    arrays = {"features": features(true), "labels": given, "trusted_features": features(trusted)}
    files.write_arrays(folder / "own.npz", arrays | {"trusted_labels": trusted}, compressed=False)


def loaded(folder: pathlib.Path) -> tuple[Any, Any]:
    """The configuration of a run on the features, and its data."""
    from configs import features
    from ieg_jax import config as config_lib
    from ieg_jax.data.load import load_data

    config = features.get_config("method=elr")
    config.data.train, config.mesh.data = str(folder / "own.npz"), 1
    with measured("load, as `data.name=features`"):
        data = load_data(config)
    with measured("hash of the data, by which a run knows them again"):
        data.fingerprint()
    return config_lib.resolve(config, data.facts), data


def measure_load(folder: pathlib.Path, n: int, k: int) -> None:
    """Loads the data."""
    loaded(folder)


def measure_batch(folder: pathlib.Path, n: int, k: int) -> None:
    """Makes the first batch and the next hundred."""
    with contextlib.redirect_stdout(None):
        config, data = loaded(folder)
    from ieg_jax import methods
    from ieg_jax.data.batches import train_batches
    from ieg_jax.runtime import mesh

    place = mesh.create(config).batch
    with measured(f"first batch, of {config.batch_size}"):
        batches = train_batches(config, data, methods.get("elr").streams, 0, 10**6, place)
        next(batches)
    with measured("the next 100 batches"):
        for _ in range(100):
            next(batches)


def measure_checkpoint(folder: pathlib.Path, n: int, k: int) -> None:
    """Saves and restores what a run of `elr` remembers of each example: t `[N, K]`, and the sums of ω and λ."""
    import jax
    import jax.numpy as jnp

    from configs import default
    from ieg_jax.runtime.checkpoints import Checkpoints
    from ieg_jax.train import examples

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.random.uniform(jax.random.key(0), (n, k))
    weight, trust = jax.random.uniform(jax.random.key(1), (2, n))
    sums = examples.Sums(weight, trust, jnp.ones(n, jnp.int32))
    tree = jax.device_put({"target": target, "examples": sums}, place)
    jax.block_until_ready(tree)
    checkpoints = Checkpoints(folder / "checkpoints", default.get_config().checkpoint)
    with measured(f"checkpoint of {sum(leaf.nbytes for leaf in jax.tree.leaves(tree)):,} bytes: the run waits"):
        checkpoints.save(1, tree, 0)
    with measured("… until it is written"):
        checkpoints.wait()
    size = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    with measured(f"… restored, from {size:,} bytes"):
        checkpoints.restore_newest(tree, print)
    checkpoints.close()


def measure_audit(folder: pathlib.Path, n: int, k: int) -> None:
    """Makes an audit of the pieces of its predictions: reads them, estimates, and writes the files."""
    from ieg_jax.audit import cleaned, page, predicted, quality, run
    from ieg_jax.audit import files as tables

    true, given = drawn_labels(n, k)
    train = types.SimpleNamespace(ids=np.arange(n), labels=given, names=names_of(n))
    out = epath.Path(folder) / "audit"
    (out / "parts").mkdir(parents=True)
    for start in predicted.rows_of(n, (1, 1)):
        part = true[start : start + predicted.AT_ONCE]
        content = {"probabilities": drawn_predictions(part, k, start), "disagreement": np.zeros(len(part), np.float32)}
        files.write_arrays(out / "parts" / f"{start:09d}.npz", content, compressed=False)
    classes = [f"class {number}" for number in range(k)]
    files.write_json(out / tables.BEGUN, {"base": "", "class_names": classes, "arrays": ""})
    with measured("audit: the pieces of the predictions are read"):
        probabilities, disagreement = predicted.training_set(out, None, Counted(n), 0, k)
    with measured("audit: estimate"):
        found = quality.estimate(probabilities, given)
    with measured(f"audit: {tables.TABLE} and {tables.TABLE_CSV}"):
        columns = run._columns(train, classes, found, disagreement, {}, None)
        tables.write_tables(out, columns, probabilities, classes)
    with measured(f"audit: {tables.CLEANLAB}"):
        tables.write_cleanlab(out, given, probabilities)
    with measured(f"audit: {tables.CLEANED}"):
        cleaned.write(out, out / tables.CLEANED)
    with measured(f"audit: {tables.PAGE}"):
        write_page(page, out / tables.PAGE, train, classes, found, disagreement)
    names = (tables.TABLE, tables.TABLE_CSV, tables.CLEANLAB, tables.CLEANED, tables.PAGE)
    sizes = [f"{name} {os.path.getsize(out / name) / 1e6:,.1f} MB" for name in names]
    error = np.abs(found.noise_rate - np.mean(given != true))
    print(f"\n{', '.join(sizes)}; noise rate off by {error:.4f}, {found.alarms or 'no alarm'}\n", flush=True)


class Counted:
    """A training set of which nothing but the length is needed, as all of it is predicted."""

    def __init__(self, n: int):
        self._n = n

    def __len__(self) -> int:
        return self._n


def names_of(n: int) -> np.ndarray:
    """Paths of so many files, `[n]` objects."""
    return np.array([f"images/{number:08d}.jpeg" for number in range(n)], object)


def write_page(page: Any, file: epath.Path, train: Any, classes: list[str], found: Any, disagreement: Any) -> None:
    """Writes the page, without images."""
    content = page.Page(
        title="scale",
        facts={},
        class_names=tuple(classes),
        ids=train.ids,
        paths=train.names,
        given=train.labels,
        suggested=found.suggested,
        right=found.right,
        confidence=found.confidence,
        disagreement=disagreement,
        weight=None,
        trust=None,
        noise_rate=found.noise_rate,
        noise_interval=found.noise_interval,
        transition=found.transition,
        calibration="",
        reliability=(),
        alarms=found.alarms,
        sample=page.draw_sample(found.right, 0),
        thumbnails={},
        texts={},
        key="scale",
    )
    page.write(content, file)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    values = flags.FLAGS
    n, k = values.n, values.classes
    logging.set_verbosity(logging.ERROR)  # Orbax tells much
    if values.only:
        globals()[f"measure_{values.only}"](pathlib.Path(values.folder), n, k)
        return
    with tempfile.TemporaryDirectory(dir=values.folder or None) as folder:
        if set(values.rows) & {"load", "batch"}:
            prepare(pathlib.Path(folder), n, k, values.dimensions)
        print(f"N = {n:,}, K = {k:,}, D = {values.dimensions}, {time.strftime('%Y-%m-%d')}\n")
        print(
            "| what | seconds | of a processor | before, MiB | peak, MiB |\n| --- | --- | --- | --- | --- |", flush=True
        )
        for row in values.rows:
            arguments = [f"--n={n}", f"--classes={k}", f"--only={row}", f"--folder={folder}"]
            subprocess.run([sys.executable, "-m", "benchmarks.scale", *arguments], check=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
