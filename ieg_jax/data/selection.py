"""Random numbers that belong to examples, and what is made of them: who is corrupted, which class is drawn."""

import numpy as np
from ml_collections import ConfigDict

SELECTIONS = ("bernoulli", "exact", "exact_per_class")

# What each stream of a seed is for.
SELECT, DRAW, TRUSTED, VALIDATION, FLIP_RATE, SUBSET, HOLDOUT, FOLD = range(8)
TABLES = 16  # and up: one for each class or each foreign source


def uniforms(seed: int, stream: int, ids: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one per id, that depend on (seed, stream, id) alone.

    The n-th output of Philox, a counter-based generator (Salmon et al. 2011), whose raw stream numpy keeps
    stable; so any host can draw for any ids.

    Args:
      seed: at least 0.
      stream: number of the purpose, so that two uses of one seed do not see the same numbers.
      ids: `[n]`, at least 0.

    Returns:
      `[n]` float64.
    """
    generator = np.random.Philox(np.random.SeedSequence([seed, stream]))
    raw = generator.random_raw(int(ids.max()) + 1)[ids]
    return (raw >> np.uint64(11)) * 2.0**-53


def select(noise: ConfigDict, ids: np.ndarray, true_labels: np.ndarray) -> np.ndarray:
    """Which examples are corrupted, by the numbers u of the first stream; only those whose true class is known.

    `bernoulli`: u < rate, each by itself. `exact`: the round(rate · N) with the smallest u, N = all whose class
    is known. `exact_per_class`: the round(rate · n) with the smallest u of the n of each true class. A half is
    rounded to the even number. Whoever is selected at one rate is selected at every higher one.

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
    """One class for each number: the first whose cumulative probability is above it.

    Args:
      probabilities: `[n, K]`, or `[1, K]` for all alike; rows are normalised here.
      u: `[n]` in [0, 1).

    Returns:
      `[n]` int32; never a class of probability 0.
    """
    cumulative = np.cumsum(probabilities, axis=1)
    # Divided by its own end, which rounding leaves beside 1, so that no u lies above it.
    return (u[:, None] >= cumulative / cumulative[:, -1:]).sum(1).astype(np.int32)
