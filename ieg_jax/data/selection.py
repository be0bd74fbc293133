"""Random numbers that belong to examples, and what they decide: who is corrupted, and which class is drawn."""

import numpy as np
from ml_collections import ConfigDict

SELECTIONS = ("bernoulli", "exact", "exact_per_class")

# The streams of random numbers that a seed gives, each for one purpose.
SELECT, DRAW, TRUSTED, VALIDATION, FLIP_RATE, SUBSET, HOLDOUT, FOLD = range(8)
TABLES = 16  # and up: one for each class or each foreign source


def uniforms(seed: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one per id, that depend on (seed, stream, id) alone.

    The number of id n is the n-th output of Philox, a counter-based generator (Salmon et al. 2011) whose raw output is
    the same in all versions of numpy. So every host can draw the numbers of any ids.

    Args:
      seed: at least 0.
      stream: number of the purpose, so that two uses of one seed do not get the same numbers.
      ids: `[n]`, at least 0.

    Returns:
      `[n]` float64.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, stream]))
    raw = generator.random_raw(int(ids.max()) + 1)[ids]
    return (raw >> np.uint64(11)) * 2.0**-53


def select(noise: ConfigDict, ids: np.ndarray, true_labels: np.ndarray) -> np.ndarray:
    """Chooses the examples that are corrupted, by the numbers u of the stream SELECT.

    Only the N examples whose true class is known can be chosen. With the selection `bernoulli` those with u < rate are,
    each by itself; with `exact` the round(rate · N) with the smallest u; with `exact_per_class`, of the n examples of
    each true class, the round(rate · n) with the smallest u. A half is rounded to the even number. An example that is
    chosen at one rate is chosen at every higher rate.

    Args:
      noise: the group `noise` of the configuration.
      ids: `[n]`.
      true_labels: `[n]`, negative = not known, or of no class.

    Returns:
      `[n]` bool.
    """
    drawn, known = uniforms(noise.seed, SELECT, ids), true_labels >= 0
    if noise.selection == "bernoulli":
        return known & (drawn < noise.rate)
    if noise.selection == "exact":
        groups = [known]
    else:
        groups = (true_labels == label for label in np.unique(true_labels[known]))
    selected = np.zeros(len(ids), bool)
    for group in groups:
        rows = np.flatnonzero(group)
        by_number = rows[np.lexsort((ids[rows], drawn[rows]))]
        selected[by_number[: round(noise.rate * len(rows))]] = True
    return selected


def draw(probabilities: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draws one class for each number: the first class whose cumulative probability is above the number.

    Args:
      probabilities: `[n, K]`, or `[1, K]` where they are the same for all numbers; rows are normalised here.
      u: `[n]` in [0, 1).

    Returns:
      `[n]` int32; never a class of probability 0.
    """
    cumulative = np.cumsum(probabilities, axis=1)
    # Rounding errors may leave the last sum a little off 1. Divided by itself it is exactly 1, so above every u.
    return (u[:, None] >= cumulative / cumulative[:, -1:]).sum(1).astype(np.int32)
