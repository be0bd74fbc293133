"""Own data at the defaults, beside what a user would do instead: real tables and images with wrong labels put on them.

    python -m benchmarks.own_data --features=letters.npz,fortunes.npz --fashion=/usr/share/datasets/fashion-mnist \
        --out=runs/own_data

Each table is an .npz file with `X` [n, D] and `y` [n], the true classes; digits, of scikit-learn, is always there. A
quarter is for testing, ten examples of each class are checked, and the labels of the others are made wrong: uniform
(any other class) or confusing (the class whose mean is nearest). Peers are logistic regression, a random forest and
gradient boosting of scikit-learn: trained on the noisy labels, on the checked ones alone, and on what cleanlab leaves,
whose filter gets out-of-fold probabilities of the same kind. Ours is IEGClassifier() as it comes. What is finished is
not done again; --show prints the tables. Needs cleanlab (`.[bench]`).
"""

import argparse
import gzip
import json
import pathlib
import time
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ieg_jax.audit.measures import judge

CHECKED, TEST = 10, 4  # checked examples per class; one in so many is for testing
IMAGES = 10_000  # of Fashion-MNIST
NOISE = ("uniform-0.2", "uniform-0.4", "confusing-0.35")
PEERS = {
    "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
    "forest": lambda: RandomForestClassifier(200, n_jobs=-1, random_state=0),
    "boosting": lambda: HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=15, random_state=0),
}


def load(name: str, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Examples and true labels: features `[n, D]`, or images `[n, H, W]` uint8."""
    if name == "digits":
        return load_digits(return_X_y=True)
    if name == "fashion":
        folder = pathlib.Path(arguments.fashion)
        pixels = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)
        return images[:IMAGES], np.frombuffer(labels, np.uint8)[:IMAGES].astype(int)
    content = np.load(next(file for file in arguments.features.split(",") if pathlib.Path(file).stem == name))
    return content["X"].astype(np.float64), content["y"].astype(int)


def divide(x: np.ndarray, y: np.ndarray, noise: str, seed: int) -> dict[str, np.ndarray]:
    """Training set (x, given, true), checked examples and test set."""
    y = np.unique(y, return_inverse=True)[1]
    k = y.max() + 1
    rng = np.random.default_rng(2000 + seed)  # the settings were chosen on splits of 1000 and 1001
    order = rng.permutation(len(y))
    test, rest = order[: len(y) // TEST], order[len(y) // TEST :]
    checked = np.concatenate([rest[y[rest] == c][:CHECKED] for c in range(k)])
    train = np.setdiff1d(rest, checked)
    given, kind, rate = y[train].copy(), *noise.split("-")
    wrong = rng.random(len(train)) < float(rate)
    if kind == "uniform":
        given[wrong] = (given[wrong] + rng.integers(1, k, wrong.sum())) % k
    else:
        flat = x[train].reshape(len(train), -1).astype(float)
        flat = (flat - flat.mean(0)) / np.maximum(flat.std(0), 1e-9)
        means = np.stack([flat[y[train] == c].mean(0) for c in range(k)])
        distance = np.square(means[:, None] - means[None]).sum(-1)
        np.fill_diagonal(distance, np.inf)
        given[wrong] = distance.argmin(1)[given[wrong]]
    return {"x": x[train], "given": given, "true": y[train], "x_checked": x[checked], "checked": y[checked],
            "x_test": x[test], "test": y[test]}  # fmt: skip


def ours(data: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """IEGClassifier at its defaults, and `supervised` likewise."""
    from ieg_jax import IEGClassifier

    augment, found = "grey" if data["x"].ndim == 3 else "photos", {}
    for method in ("ieg", "supervised"):
        start = time.perf_counter()
        keys = {} if method == "ieg" else {"method": method, "final": "network"}
        classifier = IEGClassifier(verbose=0, random_state=seed, augment=augment, **keys)
        classifier.fit(data["x"], data["given"], data["x_checked"], data["checked"])
        accuracy = float(np.mean(classifier.predict(data["x_test"]) == data["test"]))
        quality = classifier.quality_
        known = judge(quality.right, quality.suggested, data["given"], data["true"])
        found[method] = {"accuracy": accuracy, "seconds": time.perf_counter() - start, "final": classifier.final_}
        found[method] |= known | {"estimate": quality.noise_rate, "interval": quality.noise_interval}
        found[method]["alarms"] = list(quality.alarms)
        if method == "ieg":
            network = classifier.network_quality_
            found["ieg network alone"] = judge(network.right, network.suggested, data["given"], data["true"])
    return found


def peers(data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Each of PEERS on noisy labels, on checked ones, and on what cleanlab leaves; AUROC of its default score."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    x, x_checked, x_test = (data[name].reshape(len(data[name]), -1) for name in ("x", "x_checked", "x_test"))
    both, labels = np.concatenate([x, x_checked]), np.concatenate([data["given"], data["checked"]])
    found = {}
    for name, make in PEERS.items():

        def accuracy(examples, targets, make=make):
            return float(np.mean(make().fit(examples, targets).predict(x_test) == data["test"]))

        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        predicted = cross_val_predict(make(), both, labels, cv=folds, method="predict_proba")
        bad = find_label_issues(labels, predicted)
        bad[len(x) :] = False
        found[f"{name}, noisy"] = {"accuracy": accuracy(both, labels)}
        found[f"{name}, checked"] = {"accuracy": accuracy(x_checked, data["checked"])}
        score = get_label_quality_scores(labels, predicted)[: len(x)]
        known = judge(score, predicted[: len(x)].argmax(1), data["given"], data["true"])
        found[f"{name}, cleanlab"] = {"accuracy": accuracy(both[~bad], labels[~bad])} | known
    return found


def show(out: pathlib.Path) -> None:
    """Prints a Markdown table of what is there, means over the seeds in percent."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for file in sorted(out.glob("*.json")):
        name, noise, _ = file.stem.rsplit("_", 2)
        groups.setdefault((name, noise), []).append(json.loads(file.read_text()))
    print(
        "| data | noise | seeds | accuracy: best peer | ours | supervised | AUROC: best peer | ours | precision: both |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (name, noise), cells in groups.items():

        def mean(method, key, cells=cells):
            return 100 * float(np.mean([cell[method].get(key, 0) for cell in cells]))

        def best(key, cells=cells, mean=mean):
            return max((mean(method, key), method) for method in cells[0] if "," in method)

        peer, ranked = best("accuracy"), best("auroc")
        print(
            f"| {name} | {noise} | {len(cells)} | {peer[0]:.1f} ({peer[1]}) | {mean('ieg', 'accuracy'):.1f} | "
            f"{mean('supervised', 'accuracy'):.1f} | {ranked[0]:.1f} ({ranked[1]}) | {mean('ieg', 'auroc'):.1f} | "
            f"{best('precision')[0]:.1f}, {mean('ieg', 'precision'):.1f} |"
        )


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="", help=".npz files, separated by commas")
    parser.add_argument("--fashion", default="", help="folder of Fashion-MNIST")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3, help="how many: first_seed, first_seed + 1, ...")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--noise", default=",".join(NOISE))
    parser.add_argument("--show", action="store_true", help="print the tables and do nothing else")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    names = [pathlib.Path(file).stem for file in arguments.features.split(",") if file] + ["digits"]
    names += ["fashion"] if arguments.fashion else []
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    cells = [(seed, name, noise) for seed in seeds for noise in arguments.noise.split(",") for name in names]
    for seed, name, noise in [] if arguments.show else cells:
        file = out / f"{name}_{noise}_{seed}.json"
        if not file.exists():
            data = divide(*load(name, arguments), noise, seed)
            found = ours(data, seed) | peers(data)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(
                name,
                noise,
                seed,
                {method: round(values.get("accuracy", 0), 3) for method, values in found.items()},
                flush=True,
            )
    show(out)


if __name__ == "__main__":
    main()
