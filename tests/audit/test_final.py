"""The final classifier, of two clusters for each of three classes, whose labels are wrong in one direction."""

import dataclasses
import io
import types

import joblib
import numpy as np
import pytest

from ieg_jax.audit import final
from ieg_jax.audit.final import Examples, Task
from ieg_jax.audit.quality import estimate

K = 3


def make(n, seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, K, n)
    centres = np.random.default_rng(9).normal(0, 3, (K, 2, 6))
    return centres[true, rng.integers(0, 2, n)] + rng.normal(0, 1, (n, 6)), true


def network(true, seed, accuracy=0.85):
    """What a network says that is right so often, and not very sure."""
    rng = np.random.default_rng(seed)
    said = np.where(rng.random(len(true)) < accuracy, true, rng.integers(0, K, len(true)))
    return (np.eye(K)[said] * 0.7 + 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    """1,200 examples, two labels in five wrong, each of them the next class; and what the classifiers make of them."""
    x, true = make(1_200, 0)
    given = np.where(np.random.default_rng(1).random(len(true)) < 0.4, (true + 1) % K, true)
    (x_trusted, trusted), (x_held, held) = make(24, 2), make(60, 3)
    task = Task(
        Examples(x, given, network(true, 4)),
        Examples(x_trusted, trusted, network(trusted, 5, 1.0)),
        Examples(x_held, held, network(held, 6)),
        None,
        seed=0,
    )
    quality = estimate(task.noisy.predictions, given, task.held_out.predictions, held)
    return task, true, quality, final.fit(task, quality, "ieg", images=False)


def test_the_final_classifier_is_better_than_the_network_and_the_labels(case):
    task, _, _, found = case
    x, y = make(2_000, 7)
    accuracy = np.mean(found.predict_proba(x).argmax(1) == y)
    assert accuracy > 0.93 and found.name in final.CLASSIFIERS
    assert found.predict_proba(x).shape == (2_000, K) and found.predict_proba(x).dtype == np.float32
    np.testing.assert_allclose(found.predict_proba(x[:9]).sum(1), 1, atol=1e-5)
    for name in final.CLASSIFIERS:
        given = final._train(task, name, task.noisy.labels, np.ones(1_200, bool))
        assert accuracy > np.mean(given.predict(x) == y) + 0.02, name


def test_the_audit_is_better_than_that_by_the_network(case):
    task, true, quality, found = case
    wrong = task.noisy.labels != true
    misplaced = [np.mean((one.right < 0.5) != wrong) for one in (quality, found.quality)]
    assert misplaced[1] < 0.6 * misplaced[0]
    assert found.quality.noise_interval[0] < wrong.mean() < found.quality.noise_interval[1]
    assert np.mean(found.out_of_fold.argmax(1) == true) > 0.9


def test_everything_is_compared(case):
    rows = [(one.name, one.labels) for one in case[3].comparison]
    both = [(name, labels) for name in final.CLASSIFIERS for labels in ("given", "cleaned")]
    assert rows == [("network", "ieg"), *both, (rows[-1][0], "final")]
    best = max((one for one in case[3].comparison if one.labels == "cleaned"), key=lambda one: one.expected)
    assert rows[-1][0] == best.name
    low, high = case[3].comparison[0].interval
    assert low < case[3].comparison[0].held_out < high
    text = final.table(final.as_json(case[3])["comparison"])
    assert text.count("\n") == len(rows) and "on held-out trusted examples" in text and "nan" not in text


def test_out_of_fold_means_trained_without(case):
    """A memory of the training set is right on all that it was trained with, and knows nothing of the others."""
    task = case[0]

    class Memory:
        classes_ = np.arange(K)

        def fit(self, x, y):
            self.known = {row.tobytes(): label for row, label in zip(x, y, strict=True)}
            return self

        def predict_proba(self, x):
            return np.array(
                [np.eye(K)[self.known[row.tobytes()]] if row.tobytes() in self.known else [1 / 3] * 3 for row in x]
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(final.CLASSIFIERS, "memory", lambda seed, weight: Memory())
        fold = np.arange(1_200) % final.FOLDS
        found, held_out = final._out_of_fold(task, "memory", task.noisy.labels, np.ones(1_200, bool), fold)
    np.testing.assert_allclose(found, 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(held_out, 1 / 3, rtol=1e-5)


def test_expected_accuracy_by_hand(case):
    """P(right) = 0.6, P(suggested) = 0.3, and what is left goes to the third class."""
    quality = dataclasses.replace(
        case[2],
        right=np.full(3, 0.6, np.float32),
        confidence=np.full(3, 0.3, np.float32),
        suggested=np.ones(3, np.int32),
    )
    labels, rows = np.zeros(3, int), np.ones(3, bool)
    found = [final.expected_accuracy(quality, labels, rows, np.full(3, c)) for c in range(K)]
    assert found == [pytest.approx(0.6), pytest.approx(0.3), pytest.approx(0.1)]


def test_labels_are_cleaned_by_hand(case):
    quality = dataclasses.replace(
        case[2],
        right=np.array([0.9, 0.2, 0.5, 0.4], np.float32),
        confidence=np.array([0.05, 0.75, 0.45, 0.35], np.float32),
        suggested=np.array([1, 2, 1, 1], np.int32),
    )
    labels, sure = final.cleaned(quality, np.zeros(4, int))
    assert labels.tolist() == [0, 2, 0, 0] and sure.tolist() == [True, True, False, False]
    unsure = dataclasses.replace(quality, right=np.full(4, 0.5, np.float32))
    assert final.cleaned(unsure, np.zeros(4, int))[1].all() or final.cleaned(unsure, np.zeros(4, int))[1].mean() >= 0.2


@pytest.mark.parametrize(
    "images, accuracy, by_heart, kept",
    [(False, 0.8, False, True), (False, 0.8, True, False), (True, 0.3, False, False), (True, 1.0, False, True)],
)
def test_when_the_network_is_kept(case, images, accuracy, by_heart, kept):
    """Of features where it is clearly better and knows no labels by heart, of images unless it is clearly worse."""
    task = case[0]
    if by_heart:
        predictions = np.eye(K, dtype=np.float32)[task.noisy.labels] * 0.7 + 0.1
        task = dataclasses.replace(task, noisy=dataclasses.replace(task.noisy, predictions=predictions))
    held_out = dataclasses.replace(task.held_out, predictions=network(task.held_out.labels, 8, accuracy))
    hard = dataclasses.replace(task, held_out=held_out)
    if not images:  # plain classifiers see nothing but noise
        blind = np.random.default_rng(0).normal(size=task.noisy.examples.shape)
        hard = dataclasses.replace(hard, noisy=dataclasses.replace(task.noisy, examples=blind))
    found = final.fit(hard, case[2], "ieg", images, ("logistic",))
    assert (found.name == final.NETWORK) == kept


def test_it_can_be_stored(case):
    task, _, _, found = case
    stored = io.BytesIO()
    joblib.dump(found.model, stored)
    stored.seek(0)
    again = dataclasses.replace(found, model=joblib.load(stored))
    np.testing.assert_array_equal(
        again.predict_proba(task.noisy.examples[:5]), found.predict_proba(task.noisy.examples[:5])
    )


def test_the_kernel_machine_with_two_classes_and_too_many_examples(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    y = np.where(np.square(x).sum(1) > 1.2, 4, 2)
    monkeypatch.setattr(final, "LARGEST", 200 * 2**0.5 + 0.1)
    found = final.Kernel(1).fit(x, y)
    assert found.machine_[-1].shape_fit_[0] == 200
    assert np.mean(found.predict(x) == y) > 0.9 and found.predict_proba(x).shape == (300, 2)
    np.testing.assert_array_equal(found.classes_[found.predict_proba(x).argmax(1)], found.predict(x))


def test_wide_examples_are_seen_in_principal_components(case, monkeypatch):
    task, _, quality, _ = case
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(300, 300)))[0][: task.noisy.examples.shape[1]]

    def widened(part):
        return dataclasses.replace(part, examples=part.examples @ turn)

    wide = dataclasses.replace(
        task, noisy=widened(task.noisy), trusted=widened(task.trusted), held_out=widened(task.held_out)
    )
    narrow, _ = final._narrowed(wide)
    assert narrow.noisy.examples.shape == (len(task.noisy.labels), final.REDUCED)
    # A rotation and its components: distances stay.
    before, after = (np.square(x[:50] - x[1:51]).sum(1) for x in (task.noisy.examples, narrow.noisy.examples))
    np.testing.assert_allclose(before, after, rtol=1e-6)
    found = final.fit(wide, quality, "ieg", images=False, names=("logistic",))
    assert found.predict_proba(wide.noisy.examples[:3]).shape == (3, task.num_classes)
    assert np.mean(found.predict_proba(wide.held_out.examples).argmax(1) == wide.held_out.labels) > 0.8


def test_a_network_that_knows_labels_by_heart_has_no_say_in_the_end():
    """It agrees with 3 of 4 labels that it learnt from, and is right on 2 or on 4 of 4 held-out examples."""
    sure = np.eye(2)[[0, 0, 1, 1]]

    def task(noisy, held_out):
        examples = [final.Examples(np.zeros((4, 1)), np.array(labels), sure) for labels in (noisy, noisy, held_out)]
        return final.Task(*examples, None, 0)

    assert final._knows_by_heart(task([0, 0, 1, 0], [0, 1, 1, 0]))
    assert not final._knows_by_heart(task([0, 0, 1, 0], [0, 0, 1, 1]))


@pytest.mark.parametrize("name", final.CLASSIFIERS)
def test_classes_of_unequal_size_count_alike(name):
    """Of two classes that overlap, 20 : 1, the small one is hardly predicted, unless both count alike."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [400, 20])
    examples = rng.normal(size=(420, 2)) + 1.5 * labels[:, None]
    test = rng.normal(size=(400, 2)) + 1.5 * np.repeat([0, 1], 200)[:, None]
    none = final.Examples(np.empty((0, 2)), np.empty(0, int), np.empty((0, 2)))
    task = final.Task(final.Examples(examples, labels, np.full((420, 2), 0.5)), none, None, None, 0, balanced=True)
    small, balanced = (
        (final._train(task, name, labels, np.ones(420, bool), balanced).predict(test)[200:] == 1).mean()
        for balanced in (False, True)
    )
    assert balanced > small + (0.1 if name != "forest" else 0), (small, balanced)


def test_expected_accuracy_over_the_classes():
    right = np.array([0.9, 0.9, 0.9, 0.2], np.float32)
    quality = types.SimpleNamespace(right=right, confidence=1 - right, suggested=np.array([1, 1, 1, 0]),
                                    transition=np.eye(2))  # fmt: skip
    labels, rows = np.array([0, 0, 0, 1]), np.ones(4, bool)
    assert final.expected_accuracy(quality, labels, rows, labels) == pytest.approx(2.9 / 4)
    by_class = final.expected_accuracy(quality, labels, rows, labels, 1 / np.bincount(labels)[labels])
    assert by_class == pytest.approx((0.9 + 0.2) / 2)
