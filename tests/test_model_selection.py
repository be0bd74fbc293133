import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from ieg_jax.errors import UserError
from ieg_jax.model_selection import TrustedSplit

Y = np.array(list("ab" * 20 + "aabbccab" * 5 + "cc" * 3))


def test_checked_rows_are_tested_once_and_all_others_trained_with():
    mask = np.zeros(len(Y), bool)
    mask[40:80] = True
    folds = list(TrustedSplit(mask, n_splits=5).split(np.zeros((len(Y), 2)), Y))
    assert np.concatenate([test for _, test in folds]).tolist() != sorted(np.flatnonzero(mask)), "at random"
    assert sorted(np.concatenate([test for _, test in folds])) == np.flatnonzero(mask).tolist()
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(len(Y)))
        assert {name: (Y[test] == name).sum() for name in "abc"} == {"a": 3, "b": 3, "c": 2}
    again = list(TrustedSplit(np.flatnonzero(mask), n_splits=5).split(np.zeros((len(Y), 2)), Y))
    assert all((one[1] == other[1]).all() for one, other in zip(folds, again, strict=True))
    assert TrustedSplit(mask).get_n_splits() == 3


def test_a_search_does_not_choose_what_reproduces_the_noise():
    """Labels of one half are all wrong. One neighbour reproduces them, and so do rows that are judged by them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 2))
    y = (x[:, 0] > 0).astype(int)
    trusted = np.arange(600) < 60
    wrong = (x[:, 1] > 0.3) & ~trusted
    y[wrong] = 1 - y[wrong]
    candidates = {"C": [1e-3, 1e3]}
    model = LogisticRegression()
    noisy = cross_val_score(KNeighborsClassifier(15), x, y, cv=3).mean()
    honest = cross_val_score(KNeighborsClassifier(15), x, y, cv=TrustedSplit(trusted, 3)).mean()
    assert noisy > 0.9 > honest + 0.1
    search = GridSearchCV(model, candidates, cv=TrustedSplit(trusted, 3), scoring="balanced_accuracy").fit(x, y)
    assert len(search.cv_results_["split2_test_score"]) == 2


@pytest.mark.parametrize(
    "trusted, folds, message",
    [
        (np.ones(3, bool), 3, r"a mask of \(3,\), expected \(86,\)"),
        (np.arange(40), 3, "the class c has 0 checked rows"),
        (np.arange(86), 30, "n_splits=30, but the class c has 16 checked rows"),
        (np.arange(86), 1, "at least 2 folds"),
    ],
)
def test_what_cannot_be_split(trusted, folds, message):
    with pytest.raises(UserError, match=message):
        next(TrustedSplit(trusted, folds).split(np.zeros(len(Y)), Y))
