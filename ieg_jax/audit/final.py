"""The final classifier, and an audit by it: for whoever wants the best model and the surest list of wrong labels.

A network that ieg has trained finds wrong labels well, and need not be the best classifier. Of features a forest or a
kernel machine is often better, once the labels are right; and its predictions of examples that it was not trained with
are better evidence on their labels. So the two take turns:

1. Clean. Every label is replaced by the most probable class that the audit knows of; examples of whose class it is less
   sure than SURE are left out; the trusted examples are added.
2. Choose, once. A fifth of the noisy examples is kept apart, each plain classifier is trained on the other cleaned
   ones, and its score is its expected accuracy there: the mean of P(the predicted class is the true one), which the
   audit knows. No true label is needed but the trusted ones.
3. Audit. The best classifier predicts each noisy example out of fold, trained on the cleaned other four fifths, and a
   new audit is made of these predictions; ROUNDS times from 1. The last audit takes the geometric mean of these and of
   out-of-fold predictions by the same classifier, trained on the labels as given: a network that was steered wrongly,
   or has learnt wrong labels by heart, has less say in these. The network's own predictions take part as a third,
   unless it has: it then agrees with the given labels more often than it is right on held-out trusted examples.
4. The best classifier is trained on all cleaned examples. That is the final one, unless the network is better on the
   held-out trusted examples by more than two standard errors, for these are few, and does not know labels by heart; of
   images, on whose pixels a plain classifier knows little, and of the features of a backbone, on several views of which
   the network was trained, it has to be better than the network, by more than one.

The classifiers are scikit-learn's, which are well tested and fast. Where classes of unequal size are to count alike
(`class_weight=balanced`), those of 2 and 4 are weighted by the labels that they are trained on, and the expected
accuracy is a mean over the classes; those of 3 are not weighted. Of examples of more than WIDE numbers, such as the
features of a backbone, they see REDUCED principal components.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import joblib
import numpy as np
from etils import epath
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ieg_jax import files
from ieg_jax.audit.measures import pooled
from ieg_jax.audit.noise_model import softmax
from ieg_jax.audit.quality import Quality, clopper_pearson, estimate
from ieg_jax.audit.sample import Answers, as_evidence
from ieg_jax.data.splits import Split
from ieg_jax.inference import plain

SURE = 0.7  # examples of whose class the audit is less sure are left out of training
VALIDATION = 0.2  # share of the noisy examples by which the classifiers are compared
FOLDS, ROUNDS = 5, 2
LARGEST = 80_000  # of examples times √numbers that a kernel machine is trained on, whose time grows with its square
WIDE, REDUCED = 256, 128
FITTED = 20_000  # examples by which the components are found
WIDEST = 4_096  # numbers of an example; where there are more, as of large images, there are no plain classifiers
# Noisy examples times classes; a forest holds so many numbers in each tree, and would fill some 10 GB here.
MOST_NUMBERS = 4_000_000
FEWEST = 100  # noisy examples; with fewer there is nothing to choose by
LOWEST = 1e-4  # probability out of fold; a forest says 0 for what none of its trees says
NETWORK = "network"  # the name of the network that the run trained


class Kernel(ClassifierMixin, BaseEstimator):
    """A support vector machine with probabilities, the softmax of its decision values.

    scikit-learn's own are calibrated by five more trainings; here the audit calibrates them.
    """

    def __init__(self, seed: int = 0, class_weight: str | None = None):
        self.seed = seed
        self.class_weight = class_weight

    def fit(self, X, y):
        """Trains on X `[n, D]` and y `[n]`; of more than LARGEST / √D examples on so many, drawn at random."""
        rows = np.random.default_rng(self.seed).permutation(len(y))[: int(LARGEST / np.sqrt(X.shape[1]))]
        self.machine_ = make_pipeline(StandardScaler(), SVC(C=3.0, break_ties=True, class_weight=self.class_weight))
        self.machine_.fit(X[rows], y[rows])
        self.classes_ = self.machine_.classes_
        return self

    def predict_proba(self, X):
        """The probabilities `[n, K]`."""
        values = self.machine_.decision_function(X)
        return softmax(2 * (np.stack([-values, values], 1) if values.ndim == 1 else values))

    def predict(self, X):
        """The most probable class of each, `[n]`."""
        return self.classes_[self.predict_proba(X).argmax(1)]


# Name -> (seed, class_weight as scikit-learn has it) -> classifier.
CLASSIFIERS: dict[str, Callable[[int, str | None], Any]] = {
    "logistic": lambda seed, weight: make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=300, class_weight=weight)
    ),
    "forest": lambda seed, weight: ExtraTreesClassifier(200, n_jobs=-1, random_state=seed, class_weight=weight),
    "kernel": Kernel,
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples `[n, D]` with their labels `[n]` and what the network says of them, `[n, K]`."""

    examples: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """What there is to learn from.

    Attributes:
      noisy: N examples with labels as given.
      trusted: those that the network was trained with.
      held_out: those that it was not; None without any.
      held_out_given: their given labels, see `quality.estimate`; None of none.
      seed: of everything random.
      class_names: `[K]`, for the alarms; None = numbers.
      answers: a checked sample of the noisy examples, which then takes the place of the held-out ones in the audits.
      balanced: whether what is chosen and what predicts in the end are to be good on the mean over the classes, however
        unequal these are. The audits do not depend on it: P(right) needs the classes as frequent as they are.
    """

    noisy: Examples
    trusted: Examples
    held_out: Examples | None
    held_out_given: np.ndarray | None
    seed: int
    class_names: Sequence[str] | None = None
    answers: Answers | None = None
    balanced: bool = False

    @property
    def num_classes(self) -> int:
        """K."""
        return self.noisy.predictions.shape[1]


@dataclasses.dataclass(frozen=True)
class Compared:
    """One line of the comparison.

    Attributes:
      name: of the classifier.
      labels: what it was trained on: `given`, `cleaned` by the network, or `final`, cleaned in the end; of the network
        the name of its method.
      expected: its expected accuracy on noisy examples that it was not trained with; None for the network.
      held_out: its accuracy on held-out trusted examples; None without any.
      interval: (low, high), the exact 95 % interval of that; None likewise.
    """

    name: str
    labels: str
    expected: float | None
    held_out: float | None
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Final:
    """The result.

    Attributes:
      name: of the final classifier: in CLASSIFIERS, or NETWORK.
      kind: the best of CLASSIFIERS, even where the network is final.
      model: the fitted one, of classes as numbers.
      num_classes: K.
      quality: the last audit.
      out_of_fold: `[N, K]`, its predictions of the noisy examples.
      comparison: all that were compared.
    """

    name: str
    kind: str
    model: Any
    num_classes: int
    quality: Quality
    out_of_fold: np.ndarray
    comparison: tuple[Compared, ...]

    def predict_proba(self, examples: np.ndarray) -> np.ndarray:
        """Probabilities of the classes, `[n, K]` float32, of examples `[n, D]`."""
        return plain.probabilities(self.model, examples, self.num_classes)


def possible(noisy: Split) -> bool:
    """Whether there are plain classifiers for these examples."""
    if not noisy.in_memory or len(noisy) < FEWEST or noisy.images[0].size > WIDEST:
        return False
    return len(noisy) * (int(noisy.labels.max()) + 1) <= MOST_NUMBERS


def fit(task: Task, quality: Quality, method: str, images: bool, names: Sequence[str] = tuple(CLASSIFIERS)) -> Final:
    """Chooses a classifier, audits by it, and trains it on the labels that are then right.

    Args:
      task: what there is to learn from.
      quality: the audit of the noisy examples by the network.
      method: by which the network was trained.
      images: whether the examples are pixels, or features that were made of them.
      names: the classifiers to choose from.
    """
    task, components = _narrowed(task)
    noisy, held_out = task.noisy, task.held_out
    numbers = np.random.default_rng(task.seed).random(len(noisy.labels))
    rest = numbers >= VALIDATION
    truth = None if held_out is None else held_out.labels
    lines = [compared(NETWORK, method, None, None if held_out is None else held_out.predictions.argmax(1), truth)]
    labels, sure = cleaned(quality, noisy.labels)
    counting = 1 / np.bincount(labels[~rest])[labels[~rest]] if task.balanced else None
    for name in names:
        for source, new, used in (("given", noisy.labels, rest), ("cleaned", labels, rest & sure)):
            model = _train(task, name, new, used, task.balanced)
            predicted = model.predict(noisy.examples[~rest])
            expected = expected_accuracy(quality, noisy.labels, ~rest, predicted, counting)
            found = None if held_out is None else model.predict(held_out.examples)
            lines.append(compared(name, source, expected, found, truth))
    best = max((one for one in lines if one.labels == "cleaned"), key=lambda one: one.expected).name

    fold = (numbers * FOLDS).astype(int)
    for _ in range(ROUNDS):
        by_cleaned = _out_of_fold(task, best, *cleaned(quality, noisy.labels), fold)
        quality = _audit(task, *by_cleaned)
    by_given = _out_of_fold(task, best, noisy.labels, np.ones(len(fold), bool), fold)
    sources = [by_cleaned, by_given]
    by_heart = held_out is not None and _knows_by_heart(task)
    if held_out is not None and not by_heart:
        sources.append((_floored(noisy.predictions), _floored(held_out.predictions)))
    out_of_fold, elsewhere = (pooled(all_of) for all_of in zip(*sources, strict=True))
    quality = _audit(task, out_of_fold, elsewhere)

    labels, sure = cleaned(quality, noisy.labels)
    model = _train(task, best, labels, sure, task.balanced)
    found = None if held_out is None else model.predict(held_out.examples)
    lines.append(compared(best, "final", None, found, truth))
    final = NETWORK if images else best
    if held_out is not None:
        hits = (held_out.predictions.argmax(1) == truth, found == truth)
        if images:
            final = best if clearly_better(hits[1], hits[0]) else NETWORK
        else:
            final = NETWORK if clearly_better(*hits, errors=2.0) and not by_heart else best
    model = model if components is None else make_pipeline(components, model)
    return Final(final, best, model, task.num_classes, quality, by_cleaned[0], tuple(lines))


def _narrowed(task: Task) -> tuple[Task, PCA | None]:
    """The task, in principal components where its examples are wide, and what makes these."""
    if task.noisy.examples.shape[1] <= WIDE:
        return task, None
    rows = np.random.default_rng(task.seed).permutation(len(task.noisy.labels))[:FITTED]
    components = PCA(min(REDUCED, len(rows)), random_state=task.seed).fit(task.noisy.examples[rows])
    parts = {name: getattr(task, name) for name in ("noisy", "trusted", "held_out")}
    narrow = {
        name: dataclasses.replace(part, examples=components.transform(part.examples))
        for name, part in parts.items()
        if part is not None
    }
    return dataclasses.replace(task, **narrow), components


def compared(
    name: str, labels: str, expected: float | None, found: np.ndarray | None, truth: np.ndarray | None
) -> Compared:
    """A line of a comparison: `Compared`, from the predictions `[M]` of held-out examples and their labels, if any."""
    if found is None:
        return Compared(name, labels, expected, None, None)
    share = float(np.mean(found == truth))
    return Compared(name, labels, expected, share, clopper_pearson(share, len(found)))


def clearly_better(hits: np.ndarray, others: np.ndarray, errors: float = 1.0) -> bool:
    """Whether a classifier is right more often than another by more than so many standard errors, were both as good.

    One example does not decide.

    Args:
      hits: `[M]` bool, where it is right.
      others: `[M]` bool, where the other one is.
      errors: standard errors.
    """
    gain = hits.astype(float) - others.astype(float)
    return bool(gain.sum() > errors * np.sqrt(np.square(gain).sum()))


def cleaned(quality: Quality, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class `[N]` of each example, and whether the audit is sure of it, `[N]` bool.

    Where it is sure of next to none, as after a network that knows little, it is not asked to be.
    """
    keep = quality.right >= quality.confidence
    sure = np.where(keep, quality.right, quality.confidence) >= SURE
    return np.where(keep, labels, quality.suggested), sure if sure.mean() >= 0.2 else np.ones(len(labels), bool)


def expected_accuracy(
    quality: Quality, labels: np.ndarray, rows: np.ndarray, classes: np.ndarray, counting: np.ndarray | None = None
) -> float:
    """The mean of P(the predicted class is the true one).

    Of classes that are neither given nor suggested the audit tells no probability; what is left is shared among them.

    Args:
      quality: of N labels.
      labels: `[N]`, as given.
      rows: `[N]` bool, the n examples that are judged.
      classes: `[n]`, predicted.
      counting: `[n]`, how much each counts; None = all alike.
    """
    right, confidence = quality.right[rows].astype(float), quality.confidence[rows].astype(float)
    rest = np.clip(1 - right - confidence, 0, 1) / max(1, len(quality.transition) - 2)
    likely = np.where(classes == labels[rows], right, np.where(classes == quality.suggested[rows], confidence, rest))
    return float(np.average(likely, weights=counting))


def table(comparison: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as text.

    Args:
      comparison: `Compared` as dicts.
    """
    lines = [f"{'classifier':<12} {'trained on':<12} {'expected':>8}   on held-out trusted examples"]
    for one in comparison:
        expected = "" if one["expected"] is None else f"{one['expected']:.1%}"
        held_out = ""
        if one["held_out"] is not None:
            held_out = "{:.1%} ({:.1%} to {:.1%})".format(one["held_out"], *one["interval"])
        lines.append(f"{one['name']:<12} {one['labels']:<12} {expected:>8}   {held_out}".rstrip())
    return "\n".join(lines)


def as_json(final: Final) -> Mapping[str, Any]:
    """The choice and the comparison."""
    return {"classifier": final.name, "comparison": [dataclasses.asdict(one) for one in final.comparison]}


def save(final: Final, file: epath.Path) -> None:
    """Writes the fitted classifier, whole or not at all; raises StorageError where that is not possible."""
    buffer = io.BytesIO()
    joblib.dump({"kind": final.kind, "model": final.model, "num_classes": final.num_classes}, buffer)
    files.write(file, buffer.getvalue())


def _out_of_fold(
    task: Task, name: str, labels: np.ndarray, used: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions by classifiers that were trained without what they predict.

    Args:
      task: what there is to learn from.
      name: of the classifier.
      labels: `[N]`, to train on.
      used: `[N]` bool, the noisy examples to train on.
      fold: `[N]`, from 0 to FOLDS - 1, the part of each.

    Returns:
      Of the noisy examples, `[N, K]`, each by the classifier that did without its part; and of the held-out trusted
      ones, `[M, K]`, the mean of all. float32, no probability below LOWEST.
    """
    held_out = np.empty((0, task.noisy.examples.shape[1])) if task.held_out is None else task.held_out.examples
    found, elsewhere = np.empty((len(fold), task.num_classes), np.float32), []
    for number in range(FOLDS):
        mine = fold == number
        model = _train(task, name, labels, used & ~mine)
        if mine.any():
            found[mine] = plain.probabilities(model, task.noisy.examples[mine], task.num_classes)
        if len(held_out):
            elsewhere.append(plain.probabilities(model, held_out, task.num_classes))
    mean = np.mean(elsewhere, 0) if elsewhere else np.empty((0, task.num_classes), np.float32)
    return _floored(found), _floored(mean)


def _knows_by_heart(task: Task) -> bool:
    """Whether the network agrees with the labels that it learnt from more often than it is right elsewhere."""
    agreement, accuracy = (np.mean(one.predictions.argmax(1) == one.labels) for one in (task.noisy, task.held_out))
    return bool(agreement > accuracy)


def _audit(task: Task, predictions: np.ndarray, held_out: np.ndarray) -> Quality:
    if task.answers is not None:
        evidence = as_evidence(task.answers, task.noisy.labels, predictions)
    else:
        evidence = () if task.held_out is None else (held_out, task.held_out.labels, task.held_out_given)
    return estimate(predictions, task.noisy.labels, *evidence, class_names=task.class_names)


def _train(task: Task, name: str, labels: np.ndarray, used: np.ndarray, balanced: bool = False) -> Any:
    rows = np.flatnonzero(used)
    return CLASSIFIERS[name](task.seed, "balanced" if balanced else None).fit(
        np.concatenate([task.noisy.examples[rows], task.trusted.examples]),
        np.concatenate([labels[rows], task.trusted.labels]),
    )


def _floored(probabilities: np.ndarray) -> np.ndarray:
    found = np.maximum(probabilities, LOWEST)
    return found / found.sum(1, keepdims=True)
