"""How well an audit finds wrong labels, beside cleanlab: Fashion-MNIST as PNG files with lists of doubtful labels.

    python -m benchmarks.audit --fashion=/usr/share/datasets/fashion-mnist --out=runs/audit_benchmark --jobs=2

For each kind of noise and each seed, by the commands of the README: 10,000 training images and 10 checked ones per
class are written to files; `main` trains ieg on them; `audit` ranks the labels; with --folds it also trains
`supervised` on four fifths five times, which gives cleanlab the out-of-fold probabilities that it asks for; `main`
trains `supervised` on the given labels, on cleaned.csv of the first audit and on the true labels. What is finished is
not done again. Needs cleanlab (`.[bench]`).
"""

import argparse
import concurrent.futures
import csv
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import default
from ieg_jax.audit import quality as label_quality
from ieg_jax.audit.files import to_cleanlab
from ieg_jax.data.noise import kinds
from ieg_jax.data.sources.small import fashion_mnist

TRAIN, TRUSTED = 10_000, 10  # images; checked images per class
NOISE = ("uniform", "asymmetric")
RATE = 0.3
FOLDS = 5
# As configs/fashion_mnist.py has them, chosen on other images (docs/fashion.md); everything else is own_data's.
SETTINGS = (
    "--config.augment.standard=crop(pad=1)|flip",
    "--config.batch_size=100",
    "--config.num_train_epochs=12",
    "--config.eval_every_epochs=4",
    "--config.schedule.base_lr=0.05",
    "--config.method.unlabeled_weight=1",
    "--config.method.consistency_weight=2",
)


def write_images(fashion: pathlib.Path, folder: pathlib.Path) -> None:
    """Every image as a PNG file, and test.csv."""
    data = default.get_config().data
    data.name, data.dir = "fashion_mnist", str(fashion)
    source = fashion_mnist(data)
    for part in ("train", "test"):
        split = getattr(source, part)
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(split.images):
            Image.fromarray(image[..., 0]).save(folder / part / f"{number:05d}.png")
    rows = [(f"test/{number:05d}.png", source.class_names[label]) for number, label in enumerate(source.test.labels)]
    write_list(folder / "test.csv", ("path", "label"), rows)


def write_lists(fashion: pathlib.Path, folder: pathlib.Path, noise: str, seed: int) -> None:
    """labels.csv (with the column clean_label), true.csv and trusted.csv."""
    config = default.get_config()
    config.data.name, config.data.dir = "fashion_mnist", str(fashion)
    config.noise = ConfigDict(config.noise.to_dict() | {"kind": noise, "rate": RATE, "seed": seed})
    source = fashion_mnist(config.data)
    names, images = source.class_names, folder.parent / "images" / "train"
    order = np.random.default_rng(seed).permutation(len(source.train))
    train, rest = np.sort(order[:TRAIN]), order[TRAIN:]
    trusted = np.concatenate([rest[source.train.labels[rest] == c][:TRUSTED] for c in range(source.num_classes)])
    noisy = kinds.corrupt(source, config.noise)
    path = {number: str(images / f"{number:05d}.png") for number in (*train, *trusted)}
    given = [(path[i], names[noisy.labels[i]], names[noisy.clean_labels[i]]) for i in train]
    folder.mkdir(parents=True, exist_ok=True)
    write_list(folder / "labels.csv", ("path", "label", "clean_label"), given)
    write_list(folder / "true.csv", ("path", "label"), [(row[0], row[2]) for row in given])
    write_list(folder / "trusted.csv", ("path", "label"), [(path[i], names[source.train.labels[i]]) for i in trusted])


def write_list(file: pathlib.Path, heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A CSV file."""
    with file.open("w", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([heading, *rows])


def run_cell(fashion: pathlib.Path, out: pathlib.Path, noise: str, seed: int, processors: list[int]) -> dict:
    """One kind of noise with one seed; its numbers, which are kept in <cell>/result.json."""
    folder = out / f"{noise}-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    write_lists(fashion, folder, noise, seed)

    def command(module: str, *arguments: str) -> None:
        with (folder / "log.txt").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", module, *arguments],
                check=True,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: processors and os.sched_setaffinity(0, processors),
            )

    def train(method: str, labels: str, name: str) -> float:
        command(
            "ieg_jax.main",
            f"--config=configs/own_data.py:augment=grey,size=14,method={method},seed={seed}",
            f"--config.data.train={folder / labels}",
            f"--config.data.trusted={folder / 'trusted.csv'}",
            f"--config.data.test={out / 'images' / 'test.csv'}",
            *SETTINGS,
            f"--workdir={folder / name}",
        )
        return json.loads((folder / name / "result.json").read_text())["test_accuracy"]

    accuracy = {"ieg": train("ieg", "labels.csv", "ieg")}
    run, folds = f"--workdir={folder / 'ieg'}", (f"--folds={FOLDS}", "--fold_method=supervised")
    command("ieg_jax.audit", run, f"--out={folder / 'audit'}")
    command("ieg_jax.audit", run, f"--out={folder / 'audit_folds'}", *folds)
    accuracy["given"] = train("supervised", "labels.csv", "supervised_given")
    accuracy["cleaned"] = train("supervised", "audit/cleaned.csv", "supervised_cleaned")
    accuracy["true"] = train("supervised", "true.csv", "supervised_true")
    found = {"accuracy": accuracy} | measure(folder)
    result.write_text(json.dumps(found, indent=1) + "\n")
    return found


def measure(folder: pathlib.Path) -> dict:
    """What the audits and cleanlab find, against the true labels, of one cell."""
    from cleanlab.rank import get_label_quality_scores

    found = {}
    for name, part in (("audit", "audit"), ("audit --folds=5", "audit_folds")):
        summary = json.loads((folder / part / "summary.json").read_text())
        found[name] = summary["known"] | {"true_noise_rate": summary["known"]["noise_rate"]}
        found[name] |= {key: summary[key] for key in ("noise_rate", "noise_interval", "calibration_error")}
    number = {name: i for i, name in enumerate(summary["class_names"])}
    with (folder / "labels.csv").open(newline="") as opened:
        true = np.array([number[row["clean_label"]] for row in csv.DictReader(opened)])
    for name, part in (("out of fold, supervised", "audit_folds"), ("in sample, ieg", "audit")):
        content = to_cleanlab(str(folder / part))
        given, probabilities = content["labels"], content["pred_probs"]
        suggested = np.where(np.arange(len(number)) == given[:, None], -1, probabilities).argmax(1)
        for score in ("self_confidence", "normalized_margin"):
            quality = get_label_quality_scores(given, probabilities, method=score)
            found[f"cleanlab {score}, {name}"] = label_quality.judge(quality, suggested, given, true)
    return found


def report(found: dict[str, list[dict]]) -> str:
    """Tables for docs/audit.md, mean ± sample standard deviation of the seeds, in percent."""

    def cell(values):
        values = [100 * value for value in values]
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    lines = []
    for noise, results in found.items():
        lines += [f"\n{noise} {RATE}, {len(results)} seeds\n", "| | AUROC | precision | suggestions right |"]
        lines += ["| --- | --- | --- | --- |"]
        for name in [name for name in results[0] if name != "accuracy"]:
            keys = ("auroc", "precision", "suggested_right")
            lines.append(f"| {name} | " + " | ".join(cell([r[name][key] for r in results]) for key in keys) + " |")
        lines.append("\nnoise rate, in truth: estimated (interval)")
        for name in ("audit", "audit --folds=5"):
            for one in (result[name] for result in results):
                low, high = one["noise_interval"]
                rate = f"{one['true_noise_rate']:.3f}: {one['noise_rate']:.3f} ({low:.3f} to {high:.3f})"
                lines.append(f"{name}: {rate}")
        lines.append("\ntest accuracy")
        for name in results[0]["accuracy"]:
            lines.append(f"{name}: {cell([result['accuracy'][name] for result in results])}")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not finished, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=pathlib.Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; the processors are divided among them")
    parser.add_argument("--noise", nargs="+", choices=NOISE, default=NOISE)
    options = parser.parse_args()
    out = options.out.absolute()
    if not (out / "images" / "test.csv").exists():
        write_images(options.fashion, out / "images")

    processors = sorted(os.sched_getaffinity(0))
    shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    for slot in range(options.jobs):
        shares.put(processors[slot :: options.jobs])

    def run(noise, seed):
        share = shares.get()
        try:
            return run_cell(options.fashion, out, noise, seed, share)
        finally:
            shares.put(share)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {(n, s): pool.submit(run, n, s) for s in range(options.seeds) for n in options.noise}
    print(report({n: [futures[n, s].result() for s in range(options.seeds)] for n in options.noise}))


if __name__ == "__main__":
    main()
