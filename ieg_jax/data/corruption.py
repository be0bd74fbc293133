"""Label noise: which labels are wrong is a function of (noise.seed, id) alone."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data.sources import Split

KINDS = ("none", "uniform")


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


def corrupt(split: Split, noise: ConfigDict, num_classes: int) -> Split:
    """Returns the split with the labels that `config.noise` makes of its labels.

    `uniform`: with probability `noise.rate`, independently, a label is drawn anew from all `num_classes`
    classes, the old one included; so a share of rate · (K − 1)/K is wrong.
    """
    if noise.kind == "none":
        return split
    selected = uniforms(noise.seed, 0, split.ids) < noise.rate
    drawn = np.floor(uniforms(noise.seed, 1, split.ids) * num_classes).astype(np.int32)
    return dataclasses.replace(split, labels=np.where(selected, drawn, split.labels))


def report(split: Split, noise: ConfigDict, num_classes: int) -> dict:
    """What is known of the noise in a split, as plain numbers for noise.json.

    Returns:
      `kind`, nominal `rate`, `seed`, `num_examples`, `num_known` (examples with a clean label),
      `rate_effective` (share of wrong labels among those, None without any), and `confusion`: a K×K list of
      counts, row = true class, column = given label.
    """
    known = split.clean_labels >= 0
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (split.clean_labels[known], split.labels[known]), 1)
    total = int(confusion.sum())
    return {
        "kind": noise.kind,
        "rate": noise.rate,
        "seed": noise.seed,
        "num_examples": len(split),
        "num_known": total,
        "rate_effective": 1 - float(np.trace(confusion)) / total if total else None,
        "confusion": confusion.tolist(),
    }
