import pickle
import warnings

import numpy as np
import pytest
import sklearn
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier

import ieg_jax
from ieg_jax.errors import UserError
from ieg_jax.model_selection import TrustedScorer, TrustedSplit

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


# ---- The scorer.


class Always(ClassifierMixin, BaseEstimator):
    """A fitted classifier that says one class."""

    classes_ = np.array([0, 1])

    def predict(self, X):
        return np.ones(len(X), int)


def test_only_the_checked_examples_count():
    scorer = TrustedScorer(np.zeros((4, 2)), [1, 1, 1, 0])
    for rows in ((), (np.zeros((3, 2)), [0, 0, 0]), (None, None)):
        assert scorer(Always(), *rows) == 0.75
    assert scorer(Always(), sample_weight=np.zeros(4)) == 0.75, "weights are of other rows"
    assert TrustedScorer(np.zeros((4, 2)), [1, 1, 1, 0], "balanced_accuracy")(Always()) == 0.5
    assert TrustedScorer(np.zeros((4, 2)), [1, 1, 1, 0], lambda estimator, X, y: len(X))(Always()) == 4
    again = pickle.loads(pickle.dumps(scorer))
    assert again(Always()) == 0.75 and repr(again) == "TrustedScorer(4 examples, scoring='accuracy')"
    assert ieg_jax.TrustedScorer is TrustedScorer


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((4, 2)), [1, 0]), r"X of shape \(4, 2\) and y of shape \(2,\), expected as many"),
        ((np.zeros((0, 2)), []), "at least one"),
        ((3.0, 1), "at least one"),
        ((np.zeros((1, 2)), [0], "acuracy"), "acuracy"),
    ],
)
def test_what_cannot_score(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrustedScorer(*arguments)


@pytest.fixture(scope="module")
def digits():
    """Checked, noisy and test examples: of the two in five digits with the least ink the label is the next one."""
    x, true = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, true = x[order], true[order]
    checked = np.concatenate([np.flatnonzero(true == label)[:10] for label in range(10)])
    noisy, test = np.split(np.setdiff1d(np.arange(len(x)), checked), [1297])
    ink = x.sum(1)
    given = np.where(ink < np.quantile(ink, 0.4), (true + 1) % 10, true)
    return (x[checked], true[checked]), (x[noisy], given[noisy]), (x[test], true[test])


def test_a_search_by_checked_examples_finds_what_does_not_reproduce_the_noise(digits):
    checked, noisy, test = digits
    candidates = {"n_neighbors": [1, 5, 20, 60, 150]}
    found = {
        name: GridSearchCV(KNeighborsClassifier(), candidates, cv=5, n_jobs=2, scoring=scoring).fit(*noisy)
        for name, scoring in (("noisy", None), ("checked", TrustedScorer(*checked)))
    }
    accuracy = {name: search.best_estimator_.score(*test) for name, search in found.items()}
    print({name: search.best_params_ for name, search in found.items()}, accuracy)
    assert accuracy["checked"] > accuracy["noisy"] + 0.15
    assert found["checked"].score(*noisy) == found["checked"].best_estimator_.score(*checked), "it scores as it chose"


@pytest.mark.parametrize("routing", [False, True])
def test_metadata_go_to_the_estimator_alone(digits, routing):
    checked, (x, given), _ = digits
    rows = np.r_[:200]
    weights = np.ones(len(rows))
    scorers = {"one": TrustedScorer(*checked), "other": TrustedScorer(*checked, "balanced_accuracy")}
    with sklearn.config_context(enable_metadata_routing=routing), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GaussianNB()
        if routing:
            model.set_fit_request(sample_weight=True)
        arguments = {"params": {"sample_weight": weights}, "cv": 2, "error_score": "raise"}
        each = cross_val_score(model, x[rows], given[rows], scoring=scorers["one"], **arguments)
        search = GridSearchCV(
            model, {"var_smoothing": [1e-3, 1e-1]}, scoring=scorers, refit="one", cv=2, error_score="raise"
        )
        search.fit(x[rows], given[rows], sample_weight=weights)
    assert each.shape == (2,) and search.best_score_ > 0.3
    # The checked examples have ten of each class, so that both are the same.
    np.testing.assert_allclose(search.cv_results_["mean_test_one"], search.cv_results_["mean_test_other"])
