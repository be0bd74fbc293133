"""Model selection on noisy labels: a splitter and a scorer for scikit-learn that judge by checked examples alone.

A search that judges by noisy labels chooses what reproduces the noise. With TrustedSplit every fold is judged by rows
whose label was checked, and trained on all others, the noisy ones and the other checked ones:

    search = GridSearchCV(
        IEGClassifier(), {"steps": [300, 1000]}, cv=TrustedSplit(trusted), scoring="balanced_accuracy"
    )
    search.fit(X, y, trusted=trusted)

With TrustedScorer whatever was trained is judged by checked examples that were kept apart, however rows are split:

    search = GridSearchCV(SVC(), {"C": [1, 10]}, cv=5, scoring=TrustedScorer(X_checked, y_checked)).fit(X, y)
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.metrics import get_scorer
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


class TrustedScorer:
    """A scorer that judges an estimator by checked examples, and not by the rows that a search hands to it.

    It goes wherever scikit-learn takes `scoring=`, by itself or as one of several in a dict, and can be pickled. It
    asks for no metadata: weights of rows are for the estimator, the checked examples all count alike.

    Args:
      X: `[M, ...]`, checked examples that no candidate is trained with; else they show what it has learnt by heart.
      y: `[M]` their labels, which are right, written as those of the training.
      scoring: what is measured on them: a name that scikit-learn knows, such as `balanced_accuracy` or `neg_log_loss`,
        or a scorer `(estimator, X, y) -> float`.

    Raises:
      ValueError: for examples and labels that are not as many, or none, and for a name that scikit-learn does not know.
    """

    def __init__(self, X, y, scoring: str | Callable[..., float] = "accuracy"):
        count, labels = np.shape(X)[0] if np.ndim(X) else 0, np.shape(y)
        if not count or labels != (count,):
            raise UserError(
                f"TrustedScorer: X of shape {np.shape(X)} and y of shape {labels}, expected as many labels as "
                f"examples, at least one"
            )
        self.X, self.y, self.scoring = X, y, scoring
        self._scorer = get_scorer(scoring)

    def __call__(self, estimator: Any, X=None, y=None, sample_weight=None) -> float:
        """The score of a fitted estimator on the checked examples.

        Args:
          estimator: with the methods that `scoring` needs, such as `predict`.
          X: the rows that a search tests with; not used.
          y: their labels; not used.
          sample_weight: of these rows; not used.
        """
        del X, y, sample_weight
        return float(self._scorer(estimator, self.X, self.y))

    def _accept_sample_weight(self) -> bool:
        """What scikit-learn asks each of several scorers where there are weights, which it may then pass on."""
        return True

    def __repr__(self) -> str:
        return f"TrustedScorer({len(self.y)} examples, scoring={self.scoring!r})"
