"""Where the label of a corrupted example goes, for noise that depends on the true class alone.

Each function returns a matrix `[K, K]` float64: row = true class, column = new label, rows sum to 1. As the share
`rate` of the labels is corrupted, the transition matrix is T = (1 − rate) · I + rate · matrix.
"""

import numpy as np

from ieg_jax.data.sources import cifar
from ieg_jax.errors import UserError


def _cycles(groups: list[list[int]]) -> np.ndarray:
    """Maps each class to the next one of its group, the last one to the first."""
    target = np.empty(sum(map(len, groups)), np.int64)
    for group in groups:
        target[group] = np.roll(group, -1)
    return target


# Name of the data set -> for each class the one that it is mistaken for; its own number where it is not.
LOOKALIKES = {
    # bird 2 → airplane 0, cat 3 ↔ dog 5, deer 4 → horse 7, truck 9 → automobile 1
    "cifar10": np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1]),
    "cifar100": _cycles(
        [sorted(map(cifar.CIFAR100_CLASSES.index, members)) for members in cifar.CIFAR100_SUPERCLASSES.values()]
    ),
    # T-shirt/top 0 ↔ shirt 6, pullover 2 ↔ coat 4, sneaker 7 ↔ ankle boot 9
    "fashion_mnist": np.array([6, 1, 4, 3, 2, 5, 0, 9, 8, 7]),
}
NEIGHBOURS = {"cifar100": _cycles(np.arange(100).reshape(20, 5).tolist())}


def symmetric(name: str, num_classes: int) -> np.ndarray:
    """Every class but the true one, with the same probability."""
    del name
    return (1 - np.eye(num_classes)) / (num_classes - 1)


def asymmetric(name: str, num_classes: int) -> np.ndarray:
    """The one class that looks like the true one, in the data set `name` (Patrini et al. 2017 for CIFAR).

    Raises:
      UserError: for a data set without a table, and for another number of classes than in the table.
    """
    return _to_one_class(LOOKALIKES, "asymmetric", name, num_classes)


def asymmetric_contiguous(name: str, num_classes: int) -> np.ndarray:
    """The next of five contiguous fine labels of CIFAR-100, which do not make up a superclass; as in ELR's code.

    Raises:
      UserError: for another data set, and for another number of classes.
    """
    return _to_one_class(NEIGHBOURS, "asymmetric_contiguous", name, num_classes)


def _to_one_class(tables: dict[str, np.ndarray], kind: str, name: str, num_classes: int) -> np.ndarray:
    if name not in tables:
        raise UserError(
            f"noise.kind={kind} is defined for {', '.join(tables)}, not for {name}; say which classes are mistaken "
            f"for which with noise.kind=transition_matrix"
        )
    target = tables[name]
    if len(target) != num_classes:
        raise UserError(
            f"noise.kind={kind}: {name} has {num_classes} classes here, expected {len(target)}; "
            f"set data.num_classes=0, or use noise.kind=transition_matrix"
        )
    return np.eye(num_classes)[target]
