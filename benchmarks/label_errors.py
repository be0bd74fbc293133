"""The estimate of wrong labels on out-of-fold predictions of good networks, whose true labels are known.

    python -m benchmarks.label_errors cifar10n_worse-resnet18.npz … --draws=20

Each file has `probabilities` [N, K], `given` and `true` [N]. In each draw 10, and then 100, examples of each true class
are taken for checked ones; their given labels are known (pairs) or not. Printed are the means over the draws: area
under the ROC curve, average precision and precision at the true count of P(right), beside those of the given label's
margin and of its probability; the calibration error of P(right); the error of the noise rate; and how often its 95 %
interval holds the truth, and how wide it is.
"""

import argparse
import pathlib
import time

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from ieg_jax.audit.measures import binned, calibration_error
from ieg_jax.audit.quality import estimate


def ranking(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """AUROC, average precision, and precision at the true count of a score that is low for wrong labels."""
    first = np.argsort(right, kind="stable")[: wrong.sum()]
    return np.array([roc_auc_score(wrong, -right), average_precision_score(wrong, -right), wrong[first].mean()])


def simple_scores(probabilities: np.ndarray, given: np.ndarray) -> dict[str, np.ndarray]:
    """The margin of the given label, and its probability."""
    rows = np.arange(len(given))
    own, others = probabilities[rows, given], probabilities.copy()
    others[rows, given] = -1
    return {"margin": own - others.max(1), "self-confidence": own}


def main() -> None:
    """Prints a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args()
    for file in arguments.files:
        content = np.load(file)
        probabilities = content["probabilities"]
        given, true = content["given"].astype(int), content["true"].astype(int)
        wrong, k = given != true, probabilities.shape[1]
        print(f"\n{pathlib.Path(file).stem}: {len(given):,} labels, {wrong.mean():.1%} wrong")
        for name, score in simple_scores(probabilities, given).items():
            print(f"  {name:28}", *(f"{value:.4f}" for value in ranking(score, wrong)))
        nothing = estimate(probabilities, given)
        low, high = nothing.noise_interval
        print(f"  {'nothing checked':28}", *(f"{value:.4f}" for value in ranking(nothing.right, wrong)), end="")
        print(f"  rate {nothing.noise_rate:.3f} ({low:.3f} to {high:.3f})")
        for each in (10, 100):
            for paired in (False, True):
                start, rows = time.perf_counter(), []
                for seed in range(arguments.draws):
                    rng = np.random.default_rng(seed)
                    checked = np.concatenate([rng.permutation(np.flatnonzero(true == c))[:each] for c in range(k)])
                    rest = np.setdiff1d(np.arange(len(given)), checked)
                    evidence = (probabilities[checked], true[checked], given[checked] if paired else None)
                    found = estimate(probabilities[rest], given[rest], *evidence)
                    truth, (low, high) = wrong[rest].mean(), found.noise_interval
                    error = calibration_error(binned(found.right, ~wrong[rest]))
                    rows.append([*ranking(found.right, wrong[rest]), error, found.noise_rate - truth, high - low])
                    rows[-1] += [low <= truth <= high, len(found.alarms)]
                mean, largest = np.mean(rows, 0), np.max(rows, 0)
                held, alarms = (int(np.sum(rows, 0)[place]) for place in (6, 7))
                print(
                    f"  {each:3} per class, {'pairs' if paired else 'true labels':15}",
                    *(f"{value:.4f}" for value in mean[:3]),
                    f" calibration error {mean[3]:.3f} (at most {largest[3]:.3f}), rate off by {mean[4]:+.3f}, "
                    f"interval {mean[5]:.3f} wide, holds the truth in {held} of {arguments.draws}, alarms {alarms}, "
                    f"{(time.perf_counter() - start) / arguments.draws:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
