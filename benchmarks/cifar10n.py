"""CIFAR-10N on frozen features: what a user would do instead, and the audits, beside the runs of `reproduce`.

    python -m ieg_jax.reproduce run cifar10n --set=data.dir=/data/cifar10 --set=noise.file=/data/CIFAR-10_human.pt
    python -m benchmarks.cifar10n --dir=/data/cifar10 --human=/data/CIFAR-10_human.pt --runs=runs/reproduce
    python -m benchmarks.cifar10n --show

For each kind of noise and each seed, on the same division, the same checked examples and the same features as the runs:
scikit-learn's logistic regression on the noisy labels, on the checked examples alone, on what cleanlab's filter leaves,
and on the true labels (the upper bound). The peers get the checked examples too, all of them. Then the audit of the
run of ieg (`ieg_jax.audit --retrain`) with its final classifier, beside cleanlab's scores by out-of-fold probabilities
of the regression. The regularisation of the regression is the best of three on the test images of worse, which is in
its favour; --choose prints what it would be by examples of the training set that are kept apart. What is finished is
not done again. Needs cleanlab (`.[bench]`).
"""

import argparse
import json
import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from etils import epath
from pyarrow import parquet
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from ieg_jax.audit.files import CLASSIFIER, TABLE
from ieg_jax.audit.measures import judge
from ieg_jax.audit.options import Options
from ieg_jax.audit.run import audit
from ieg_jax.data.load import Data, load_data
from ieg_jax.reproduce import experiments, results

RESULTS = pathlib.Path("results")
FOLDS = 3
STRENGTHS = (1e-4, 1e-3, 1e-2)  # of the regression: C
CHOSEN = {"noisy": 1e-4, "clean": 1e-3}
CELLS = {
    **{labels: {"labels": labels} for labels in experiments.CIFAR10N_LABELS},
    **{f"{noise}-{rate:g}": {"noise": noise, "rate": rate} for noise, rate in experiments.CIFAR10N_NOISE},
}


def load(cell: str, seed: int, arguments: argparse.Namespace, **keys: Any) -> Data:
    """The data of a run of `reproduce`."""
    config = results.load_config(experiments.cifar10n("ieg", **CELLS[cell]), seed)
    config.data.dir = arguments.dir
    if config.noise.kind == "human":
        config.noise.file = arguments.human
    config.backbone.views = 1  # peers have no use for views
    config.update_from_flattened_dict(keys)
    return load_data(config)


def regression(strength: float) -> LogisticRegression:
    """Logistic regression on standardised features."""
    return LogisticRegression(C=strength, max_iter=200)


def flat(split) -> np.ndarray:
    """Standardised features `[n, D]`."""
    return split.images.reshape(len(split), -1)


def peers(data: Data) -> dict[str, Any]:
    """Accuracies, and how well cleanlab finds wrong labels."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    checked = [data.trusted, data.held_out]
    x_checked, checked_labels = np.concatenate([*map(flat, checked)]), np.concatenate([one.labels for one in checked])
    x, given, true = flat(data.train), data.train.labels, data.train.clean_labels
    both, labels = np.concatenate([x, x_checked]), np.concatenate([given, checked_labels])

    def accuracy(examples, targets, strength):
        return float(regression(strength).fit(examples, targets).score(flat(data.evaluation), data.evaluation.labels))

    noisy, clean = CHOSEN["noisy"], CHOSEN["clean"]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(regression(noisy), both, labels, cv=folds, method="predict_proba")
    bad = find_label_issues(labels, predicted, n_jobs=1)  # no fork of a process in which jax runs
    bad[len(x) :] = False
    found = {
        "logistic, noisy": {"accuracy": accuracy(both, labels, noisy)},
        "logistic, checked": {"accuracy": accuracy(x_checked, checked_labels, clean)},
        "logistic, cleanlab": {"accuracy": accuracy(both[~bad], labels[~bad], clean)},
        "logistic, true": {"accuracy": accuracy(both, np.concatenate([true, checked_labels]), clean)},
    }
    for score in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        right = get_label_quality_scores(labels, predicted, method=score)[: len(x)]
        found[f"cleanlab, {score}"] = of_audit(right, predicted[: len(x)].argmax(1), given, true)
    return found


def of_audit(right, suggested, given, true) -> dict[str, float]:
    """AUROC, AP and precision of scores by which labels are right."""
    found = judge(right, suggested, given, true)
    return found | {"average_precision": float(average_precision_score(given != true, -right))}


def audited(run: pathlib.Path, data: Data) -> dict[str, Any]:
    """The audit of a run of ieg: how well it finds wrong labels, what it says of itself, and its final classifier."""
    from ieg_jax import inference
    from ieg_jax.inference import plain

    with tempfile.TemporaryDirectory() as folder:
        out, began = pathlib.Path(folder) / "audit", time.monotonic()
        summary = audit(str(run), str(out), Options(force=True, retrain=True))
        seconds = time.monotonic() - began
        table = parquet.read_table(out / TABLE)
        assert (table["id"].to_numpy() == data.train.ids).all()
        right, names = table["p_right"].to_numpy(), list(data.class_names)
        suggested = np.array([names.index(name) for name in table["suggested_label"].to_pylist()])
        trained = inference.load(epath.Path(run))
        by = inference.predictor(trained)(data.evaluation)
        found = {"network": {"accuracy": float(np.mean(by.argmax(1) == data.evaluation.labels))}}
        for source in ("given", "cleaned"):
            network = inference.load(out / "retrained" / source)
            hits = inference.predictor(network)(data.evaluation).argmax(1) == data.evaluation.labels
            found[f"supervised, {source}"] = {"accuracy": float(hits.mean())}
        if "final" in summary:
            _, classify = plain.load(str(out / CLASSIFIER), data.num_classes)
            hits = classify(data.evaluation).argmax(1) == data.evaluation.labels
            found["final"] = {"accuracy": float(hits.mean()), "name": summary["final"]["classifier"]}
    known = of_audit(right, suggested, data.train.labels, data.train.clean_labels)
    wrong = data.train.labels != data.train.clean_labels
    edges = np.quantile(right, np.linspace(0, 1, 16)[1:-1])
    bins = np.searchsorted(edges, right)
    known["calibration_error"] = float(
        sum(abs((1 - wrong[bins == b]).sum() - right[bins == b].sum()) for b in range(15)) / len(wrong)
    )
    known |= {"estimate": summary["noise_rate"], "interval": summary["noise_interval"], "seconds": seconds}
    return found | {"audit": known | {"alarms": summary["alarms"], "judged_by": summary["judged_by"]}}


def choose(arguments: argparse.Namespace) -> None:
    """Prints what the regression gets on examples that are kept apart, for each strength."""
    for cell in ("worse", "uniform-0.8"):
        data = load(cell, 100, arguments, **{"data.validation_size": 5000})
        for name, labels in (("noisy", data.train.labels), ("true", data.train.clean_labels)):
            for strength in STRENGTHS:
                model = regression(strength).fit(flat(data.train), labels)
                print(cell, name, strength, model.score(flat(data.evaluation), data.evaluation.labels), flush=True)


def show() -> None:
    """Prints the tables in Markdown, means over the seeds in percent."""
    kept: dict[str, dict[str, list]] = {}
    for cell in CELLS:
        for file in sorted((RESULTS / f"cifar10n-peers-{cell}").glob("*.json")):
            for name, values in json.loads(file.read_text()).items():
                kept.setdefault(name, {}).setdefault(cell, []).append(values)

    def line(name, key, scale=100.0):
        cells = [[values[key] for values in kept[name].get(cell, []) if key in values] for cell in CELLS]
        return [f"{scale * np.mean(cell):.1f}" if cell else "" for cell in cells]

    print(f"| accuracy | {' | '.join(CELLS)} |\n|{' --- |' * (1 + len(CELLS))}")
    for name in kept:
        if any("accuracy" in one for cell in kept[name].values() for one in cell):
            print(f"| {name} | {' | '.join(line(name, 'accuracy'))} |")
    for key in ("auroc", "average_precision", "precision", "calibration_error"):
        print(f"\n| {key} | {' | '.join(CELLS)} |\n|{' --- |' * (1 + len(CELLS))}")
        for name in kept:
            if name == "audit" or name.startswith("cleanlab"):
                print(f"| {name} | {' | '.join(line(name, key))} |")
    print("\n| wrong labels | true | estimate | holds the truth |\n| --- | --- | --- | --- |")
    for cell, found in kept.get("audit", {}).items():
        holds = sum(one["interval"][0] <= one["noise_rate"] <= one["interval"][1] for one in found)
        rate, said = (100 * np.mean([one[key] for one in found]) for key in ("noise_rate", "estimate"))
        print(f"| {cell} | {rate:.1f} | {said:.1f} | {holds} of {len(found)} |")


def main() -> None:
    """Does what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="folder of CIFAR-10")
    parser.add_argument("--human", help="CIFAR-10_human.pt")
    parser.add_argument("--runs", default="runs/reproduce", help="work folders of reproduce")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--choose", action="store_true", help="print by what the regression was set")
    parser.add_argument("--show", action="store_true", help="print the tables and do nothing else")
    arguments = parser.parse_args()
    if arguments.choose:
        choose(arguments)
        return
    for seed in range(0 if arguments.show else arguments.seeds):
        for cell in arguments.cells.split(","):
            file = RESULTS / f"cifar10n-peers-{cell}" / f"{seed}.json"
            run = pathlib.Path(arguments.runs) / experiments.cifar10n("ieg", **CELLS[cell]).name / str(seed)
            found = json.loads(file.read_text()) if file.exists() else {}
            data = None
            if "logistic, noisy" not in found:
                data = load(cell, seed, arguments)
                found |= peers(data)
            if "audit" not in found and (run / "result.json").exists():
                found |= audited(run, data or load(cell, seed, arguments))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")
            print(cell, seed, {name: round(v.get("accuracy", v.get("auroc", 0)), 4) for name, v in found.items()})
    show()


if __name__ == "__main__":
    main()
