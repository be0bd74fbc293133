"""Model selection on noisy labels: a splitter for scikit-learn's searches that judges by checked rows alone.

A search that judges by noisy labels chooses what reproduces the noise. With TrustedSplit every fold is judged by rows
whose label was checked, and trained on all others, the noisy ones and the other checked ones:

    search = GridSearchCV(
        IEGClassifier(), {"steps": [300, 1000]}, cv=TrustedSplit(trusted), scoring="balanced_accuracy"
    )
    search.fit(X, y, trusted=trusted)
"""

from collections.abc import Iterator

import numpy as np
from sklearn.model_selection import BaseCrossValidator, StratifiedKFold

from ieg_jax.errors import UserError


class TrustedSplit(BaseCrossValidator):
    """Cross-validation whose test parts are checked rows, divided so that each has its share of every class.

    Args:
      trusted: which rows of X have a label in y that is right: a mask `[N]` of bool, or row numbers.
      n_splits: the number of folds, at least 2 and at most the checked rows of the rarest class.
      random_state: of the division.
    """

    def __init__(self, trusted, n_splits: int = 3, random_state: int | None = 0):
        self.trusted = trusted
        self.n_splits = n_splits
        self.random_state = random_state

    def get_n_splits(self, X=None, y=None, groups=None) -> int:
        """The number of folds."""
        del X, y, groups
        return self.n_splits

    def split(self, X, y=None, groups=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the rows of each fold: all but the tested ones, and the tested ones.

        Args:
          X: `[N, ...]`, of which the length counts.
          y: `[N]` labels; those of the checked rows are right.
          groups: not used.

        Raises:
          ValueError: where there are too few checked rows of a class.
        """
        del groups
        number, labels = len(X), np.asarray(y)
        rows = np.asarray(self.trusted)
        if rows.dtype == bool and rows.shape != (number,):
            raise UserError(f"trusted: a mask of {rows.shape}, expected ({number},), one for each row of X")
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        names, counts = np.unique(labels[rows], return_counts=True)
        absent = np.setdiff1d(labels, names)
        fewest = 0 if len(absent) else counts.min()
        if not 2 <= self.n_splits <= fewest:
            rarest = absent[0] if len(absent) else names[counts.argmin()]
            raise UserError(
                f"n_splits={self.n_splits}, but the class {rarest!s} has {fewest} checked rows; expected at least 2 "
                f"folds, and as many checked rows of each class"
            )
        folds = StratifiedKFold(self.n_splits, shuffle=True, random_state=self.random_state)
        for _, chosen in folds.split(rows, labels[rows]):
            test = np.sort(rows[chosen])
            yield np.setdiff1d(np.arange(number), test), test
