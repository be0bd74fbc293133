"""The trusted set: a few examples per class whose labels are right, in an order that makes balanced batches."""

import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data import corruption, sources
from ieg_jax.data.sources import Split
from ieg_jax.errors import UserError


def split_trusted(source: sources.Source, trusted: ConfigDict) -> tuple[Split, Split]:
    """Takes the trusted set as `config.trusted` says.

    Args:
      source: the data before noise.
      trusted: the group `trusted` of the configuration.

    Returns:
      The training set without the trusted examples, and the trusted set: labels true, interleaved by class
      (0, 1, ..., K-1, 0, 1, ...), which any batch of a multiple of K consecutive examples balances.

    Raises:
      UserError: where a class has too few examples with a known label, or is absent from the trusted set.
    """
    classes = np.arange(source.num_classes)
    if trusted.source == "separate":
        if source.trusted is None:
            raise UserError(
                f"trusted.source=separate, but {source.name} brings no trusted set (arrays: trusted_images and "
                f"trusted_labels); add one, or set trusted.source=train"
            )
        counts = np.bincount(source.trusted.labels, minlength=source.num_classes)
        if (counts == 0).any():
            raise UserError(
                f"the trusted set of {source.name} has no example of class {int(np.argmin(counts))}; "
                f"expected at least one of each of the {source.num_classes} classes"
            )
        return source.train, source.trusted.take(_interleave(source.trusted.labels))

    true_labels = source.train.clean_labels
    if (true_labels < 0).all():
        raise UserError(
            f"trusted.source=train, but no true label of {source.name} is known; give the data clean_labels, "
            f"or a trusted set of its own with trusted.source=separate"
        )
    counts = np.bincount(true_labels[true_labels >= 0], minlength=source.num_classes)
    short = classes[counts < trusted.per_class]
    if len(short):
        raise UserError(
            f"trusted.per_class={trusted.per_class}, but class {short[0]} of {source.name} has only "
            f"{counts[short[0]]} training examples with a known label; lower it"
        )
    # The examples of each class in random order; the first n of each are trusted.
    order = np.argsort(corruption.uniforms(trusted.seed, 2, source.train.ids), kind="stable")
    chosen = np.concatenate([order[true_labels[order] == c][: trusted.per_class] for c in classes])
    rest = np.setdiff1d(np.arange(len(source.train)), chosen)
    if not len(rest):
        raise UserError(f"trusted.per_class={trusted.per_class} leaves no training examples; lower it")
    probe = source.train.take(chosen)
    probe = Split(probe.images, probe.clean_labels, probe.clean_labels, probe.ids)
    return source.train.take(rest), probe.take(_interleave(probe.labels))


def report(probe: Split, trusted: ConfigDict) -> dict:
    """What the trusted set is, as plain numbers for trusted.json."""
    return {
        "source": trusted.source,
        "seed": trusted.seed,
        "per_class": np.bincount(probe.labels).tolist(),
        "ids": probe.ids.tolist(),
        "labels": probe.labels.tolist(),
    }


def _interleave(labels: np.ndarray) -> np.ndarray:
    """Rows in the order first of each class, second of each class, ..."""
    rank = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        rank[rows] = np.arange(len(rows))
    return np.lexsort((labels, rank))
