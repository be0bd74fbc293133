"""The model of given labels: what the network says, calibrated, and how a true class becomes a given label.

Example i has a true class c, for which the network gives the probability q_i(c). Its given label y was drawn from
T[c, y], whatever the image. By Bayes' rule

    P(c | x, y) ∝ q(c) · T[c, y]          P(the given label is right) = P(c = y | x, y)

q is made of the network's log-probabilities, less their mean, z, in two steps,

    q = softmax(z / τ + A z / τ + b)

- The temperature τ (Guo et al. 2017, "On Calibration of Modern Neural Networks") is chosen so that trusted labels with
  which the network was *not* trained become likely; those that it was trained with it has learnt. The prior is
  log₂ τ ~ N(−¼, ½²), as a network that was trained with mixup is not sure enough: values of τ from 0.7 to 0.85 were
  measured. The given labels count as one measurement of log₂ τ, with the same deviation: of the share D of them that
  the network disagrees with, a quarter is taken for its own mistakes, so that q should be sure of 1 − D/4 on average.
  (The τ that makes the given labels likely is no measurement: a network that was trained on labels of which 40 % are
  wrong predicts these labels best as it is, with T = I.)
- The correction (A, b) is small, and is chosen so that the *given* labels become likely under the model above. A
  network that was steered by a handful of trusted images prefers some classes to others that look like them; thousands
  of labels, most of them right, show which. This is matrix scaling (the same paper; with log-probabilities it is
  Dirichlet calibration, Kull et al. 2019) for labels with noise. Its K (K + 1) numbers have the prior N(0, s²), A in
  units of the deviation of z. Of several s the one is taken with which the labels of one half of the examples become
  likeliest under the correction of the other half; s = 0 unless another is better by more than a standard error.

T is fitted by expectation-maximisation (Dempster et al. 1977), in two models: *uniform*, in which a wrong label is any
other class with the same probability, with one parameter, and *by class*, with K (K − 1) of them. The one with the
higher Bayesian information criterion, log-likelihood − ½ · parameters · log N (Schwarz 1978), is used. The second is
not always better: where labels are wrong at random, it takes classes that the network mixes up for classes that the
labels mix up.

Predictions of all examples are read in parts of AT_ONCE numbers, so they may lie in a file (`numpy.memmap`). All of
them calibrated are needed by the second model alone, and only where many enough examples could pay for its parameters.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from scipy.optimize import minimize

from ieg_jax import files

TEMPERATURES = 2.0 ** np.arange(-4, 1.75, 0.25)  # the values of τ that are tried
PRIOR_MEAN, PRIOR_DEVIATION = -0.25, 0.5  # of log₂ τ
LEAST_DISAGREEMENT = 0.05  # D counts as this where it is less, for nothing should be taken to be certain
GIVEN_DEVIATION = 0.5  # of log₂ τ as measured with the given labels
CORRECTIONS = (0.1, 0.3)  # the deviations s of the correction that are tried besides 0
CORRECTED_CLASSES = 200  # with more classes there is no correction, as it has K (K + 1) numbers
# τ and the correction are found on no more examples than these, evenly spaced, with all classes so many numbers.
EXAMPLES, NUMBERS = 50_000, 1_000_000
# Expectation-maximisation ends after so many rounds, or when a round gains less log-likelihood than this per example.
ROUNDS, TOLERANCE = 200, 1e-7
# For each class, so many examples are added to those that are counted: given as itself, and given as others. So T is a
# distribution for a class without examples too, and where no label seems to be wrong P(right) is still ordered as q.
PSEUDO_RIGHT, PSEUDO_WRONG = 0.5, 0.05
LOWEST = 1e-12  # probability; smaller ones count as this
AT_ONCE = 4_000_000  # numbers that are worked on at once


@dataclasses.dataclass(frozen=True)
class NoiseModel:
    """Calibration of a network and noise of its labels, K classes.

    Attributes:
      temperature: τ.
      correction: `[K, K + 1]`, A and then b.
      transition: T `[K, K]`, P(given = j | true = i).
      by_class: whether T was fitted class by class; else a wrong label is any other class with the same probability.
    """

    temperature: float
    correction: np.ndarray
    transition: np.ndarray
    by_class: bool


class Fitter:
    """Fits the model to one set of labels, with several sets of held-out examples.

    What is the same for all of them is computed once.
    """

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray):
        """Takes the data.

        Args:
          probabilities: `[N, K]`, the network's predictions.
          labels: `[N]` int, as given.
        """
        n, k = probabilities.shape
        self._probabilities, self._labels = probabilities, labels
        rows = np.linspace(0, n - 1, min(n, EXAMPLES, max(1_000, NUMBERS // k))).astype(int)
        self._some = probabilities[rows], labels[rows]
        self._none = np.zeros((k, k + 1))
        self._measured = measured_temperature(*self._some)
        self._corrections: dict[float, np.ndarray] = {}
        self._models: dict[tuple[float, float], NoiseModel] = {}

    def fit(self, probabilities: np.ndarray | None = None, labels: np.ndarray | None = None) -> NoiseModel:
        """Fits the model.

        First the correction is found, at the temperature that is best without one, then the temperature with it.

        Args:
          probabilities: `[M, K]`, of trusted examples that the network was not trained with; or None.
          labels: `[M]` int, their true labels.
        """
        first = self._temperature(probabilities, labels, self._none)
        if first not in self._corrections:
            corrected = len(self._none) <= CORRECTED_CLASSES
            self._corrections[first] = find_correction(*self._some, first) if corrected else self._none
        correction = self._corrections[first]
        best = self._temperature(probabilities, labels, correction)
        if (first, best) not in self._models:

            def q(rows: slice) -> np.ndarray:
                return calibrated(self._probabilities[rows], best, correction)

            transition, by_class = fit_transition(q, self._labels, len(correction))
            self._models[first, best] = NoiseModel(best, correction, transition, by_class)
        return self._models[first, best]

    def _temperature(self, probabilities, labels, correction: np.ndarray) -> float:
        weights = temperature_weights(self._measured, probabilities, labels, correction)
        return float(TEMPERATURES[weights.argmax()])


def calibrated(probabilities: np.ndarray, temperature: float, correction: np.ndarray) -> np.ndarray:
    """The model's q, softmax(z / τ + A z / τ + b), `[n, K]` float32.

    Args:
      probabilities: `[n, K]`, the network's predictions.
      temperature: τ.
      correction: `[K, K + 1]`, A and then b.
    """
    q = np.empty(probabilities.shape, np.float32)
    for rows in parts(*probabilities.shape):
        logits = centred_logs(probabilities[rows]) / temperature
        q[rows] = softmax(logits + _correction_of(logits, correction) if correction.any() else logits)
    return q


def posterior_parts(model: NoiseModel, probabilities: np.ndarray, labels: np.ndarray) -> Iterator[tuple]:
    """The posterior of the true classes, part by part, as the whole may not fit into memory.

    Args:
      model: the fitted one.
      probabilities: `[N, K]`.
      labels: `[N]`, as given.

    Yields:
      A slice of the rows, the log-odds `[n]` of P(given label is right), and `[n, K]` the distribution of the true
      class where the label is wrong: 0 for the given class, rows that sum to 1.
    """
    by_given = np.ascontiguousarray(model.transition.T)
    for rows in parts(*probabilities.shape):
        given = labels[rows]
        joint = calibrated(probabilities[rows], model.temperature, model.correction).astype(np.float64)
        joint *= by_given[given]
        index = np.arange(len(given))
        right = joint[index, given]
        joint[index, given] = 0
        wrong = joint.sum(1)
        log_odds = np.log(np.clip(right, 1e-300, None)) - np.log(np.clip(wrong, 1e-300, None))
        joint /= np.clip(wrong, 1e-300, None)[:, None]
        yield rows, log_odds, joint


def parts(n: int, k: int) -> Iterator[slice]:
    """The rows of a matrix `[n, k]` as slices that can be worked on at once."""
    size = max(1, AT_ONCE // k)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def centred_logs(probabilities: np.ndarray) -> np.ndarray:
    """The network's log-probabilities less the mean of the classes, `[n, K]` float64."""
    logs = np.log(np.clip(probabilities, LOWEST, None).astype(np.float64))
    return logs - logs.mean(1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of `[n, K]`."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def measured_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The one of TEMPERATURES at which the network is as sure, on average, as it should be by the given labels."""
    wanted = 1 - max(LEAST_DISAGREEMENT, np.mean(probabilities.argmax(1) != labels)) / 4
    logits = centred_logs(probabilities)
    sure = [softmax(logits / temperature).max(1).mean() for temperature in TEMPERATURES]
    return float(TEMPERATURES[np.abs(np.array(sure) - wanted).argmin()])


def temperature_weights(
    measured: float, probabilities: np.ndarray | None, labels: np.ndarray | None, correction: np.ndarray
) -> np.ndarray:
    """The posterior of each of TEMPERATURES: prior · measurement with the given labels · likelihood of held-out labels.

    Args:
      measured: τ as measured with the given labels.
      probabilities: `[M, K]` of held-out examples, or None.
      labels: `[M]`, or None.
      correction: `[K, K + 1]`.

    Returns:
      `[len(TEMPERATURES)]`, sums to 1.
    """
    log_weights = -0.5 * ((np.log2(TEMPERATURES) - PRIOR_MEAN) / PRIOR_DEVIATION) ** 2
    log_weights -= 0.5 * (np.log2(TEMPERATURES / measured) / GIVEN_DEVIATION) ** 2
    if labels is not None and len(labels):
        rows = np.arange(len(labels))
        log_weights = log_weights + [
            np.log(np.clip(calibrated(probabilities, temperature, correction)[rows, labels], LOWEST, None)).sum()
            for temperature in TEMPERATURES
        ]
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def _correction_of(logits: np.ndarray, correction: np.ndarray) -> np.ndarray:
    return logits @ correction[:, :-1].T + correction[:, -1]


def find_correction(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The most probable correction `[K, K + 1]`, with the deviation that was chosen on other halves of the examples.

    Args:
      probabilities: `[n, K]`, the network's predictions.
      labels: `[n]`, as given.
      temperature: τ.
    """
    logits = centred_logs(probabilities) / temperature
    k = logits.shape[1]
    zero = np.zeros((k, k + 1))
    scale = np.full((k, k + 1), 1 / max(logits.std(), 1e-6))
    scale[:, -1] = 1.0  # of b
    halves = [np.arange(len(labels)) % 2 == half for half in (0, 1)]
    if not all(half.any() for half in halves):
        return zero
    gains = np.zeros((len(CORRECTIONS), len(labels)))
    for half in halves:
        transition, _ = fit_transition(softmax(logits[~half]).__getitem__, labels[~half], k)
        before = _log_likelihood(zero, logits[half], labels[half], transition)
        start = zero
        for number, deviation in enumerate(CORRECTIONS):
            start = _most_probable_correction(start, logits[~half], labels[~half], transition, deviation * scale)
            gains[number, half] = _log_likelihood(start, logits[half], labels[half], transition) - before
    best = gains.mean(1).argmax()
    if gains[best].mean() <= gains[best].std() / np.sqrt(len(labels)):
        return zero
    correction, q = zero, softmax(logits)
    for _ in range(2):  # T changes with the correction, and the correction with T
        transition, _ = fit_transition(q.__getitem__, labels, k)
        correction = _most_probable_correction(correction, logits, labels, transition, CORRECTIONS[best] * scale)
        q = softmax(logits + _correction_of(logits, correction))
    return correction


def _most_probable_correction(start, logits, labels, transition, deviations) -> np.ndarray:
    shape = start.shape

    def loss(flat):
        value, gradient = correction_loss(flat.reshape(shape), logits, labels, transition, deviations)
        return value, gradient.ravel()

    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 100})
    return found.x.reshape(shape)


def correction_loss(
    correction: np.ndarray, logits: np.ndarray, labels: np.ndarray, transition: np.ndarray, deviations: np.ndarray
) -> tuple[float, np.ndarray]:
    """−log of the likelihood Π_i Σ_c q_i(c) T[c, y_i] times the prior of the correction, and its gradient.

    The gradient with respect to the corrected logits of an example is q(c) − P(c | x, y).

    Args:
      correction: `[K, K + 1]`.
      logits: `[N, K]`, z / τ.
      labels: `[N]` int, as given.
      transition: T `[K, K]`.
      deviations: `[K, K + 1]`, of the prior.

    Returns:
      The value, without the terms that do not depend on the correction, and the gradient `[K, K + 1]`.
    """
    q = softmax(logits + _correction_of(logits, correction))
    joint = q * transition[:, labels].T
    total = np.clip(joint.sum(1, keepdims=True), 1e-300, None)
    by_logits = q - joint / total
    gradient = np.concatenate([by_logits.T @ logits, by_logits.sum(0)[:, None]], 1)
    value = -np.log(total).sum() + 0.5 * np.square(correction / deviations).sum()
    return float(value), gradient + correction / deviations**2


def _log_likelihood(correction, logits, labels, transition) -> np.ndarray:
    """The log-likelihood log Σ_c q(c) T[c, y] of each example."""
    q = softmax(logits + _correction_of(logits, correction))
    return np.log(np.clip((q * transition[:, labels].T).sum(1), 1e-300, None))


def fit_transition(q: Callable[[slice], np.ndarray], labels: np.ndarray, k: int) -> tuple[np.ndarray, bool]:
    """Fits both models of T and returns the better one, and whether it is the one by class.

    Args:
      q: rows -> `[n, K]`, the calibrated predictions of these.
      labels: `[N]`, as given.
      k: K.
    """
    n = len(labels)
    penalty = 0.5 * np.log(n)
    right = np.concatenate([np.take_along_axis(q(rows), labels[rows, None], 1)[:, 0] for rows in parts(n, k)])
    likelihood, transition = maximise_uniform(right, k)
    # Labels are never likelier than certain, log-likelihood 0. With many classes that settles it, and the predictions,
    # which may be larger than memory, need not be put in order.
    if likelihood - penalty >= -k * (k - 1) * penalty:
        return transition, False
    order = np.argsort(labels, kind="stable")
    places = np.empty(n, np.int64)
    places[order] = np.arange(n)
    ordered = None
    for rows in parts(n, k):
        part = q(rows)
        ordered = files.scratch((n, k), part.dtype) if ordered is None else ordered
        ordered[places[rows]] = part
    by_class = maximise(ordered, np.searchsorted(labels[order], np.arange(k + 1)), class_transition)
    better = by_class[0] - k * (k - 1) * penalty > likelihood - penalty
    return (by_class[1] if better else transition), bool(better)


def maximise_uniform(right: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """What `maximise` finds with `uniform_transition`: with one rate, q of the given class is all that counts.

    Args:
      right: `[N]`, q of the given class.
      k: K.
    """
    right = right.astype(np.float64)
    n, transition, likelihood, before = len(right), _first_transition(k), -np.inf, -np.inf
    for _ in range(ROUNDS):
        right_rate, wrong_rate = transition[0, 0], transition[0, -1]
        total = np.clip(right * (right_rate - wrong_rate) + wrong_rate, 1e-30, None)
        likelihood = float(np.log(total).sum())
        if likelihood - before < TOLERANCE * n:
            break
        before = likelihood
        trace = float((right / total).sum()) * right_rate
        transition = _with_rate(k, trace, n - trace)
    return likelihood, transition


def _first_transition(k: int) -> np.ndarray:
    """T `[K, K]` with which expectation-maximisation begins."""
    return np.where(np.eye(k, dtype=bool), 0.7, 0.3 / max(1, k - 1))


def maximise(q: np.ndarray, ends: np.ndarray, update: Callable[[np.ndarray], np.ndarray]) -> tuple[float, np.ndarray]:
    """Expectation-maximisation.

    With the examples in the order of their labels, both steps are products of a matrix with a vector.

    Args:
      q: `[N, K]`, rows in the order of their given labels.
      ends: `[K + 1]`, of which those given as y are rows ends[y] to ends[y + 1].
      update: counts `[true, given]` -> T, `uniform_transition` or `class_transition`.

    Returns:
      The log-likelihood of the labels and T `[K, K]`.
    """
    n, k = q.shape
    transition, likelihood, before = _first_transition(k), -np.inf, -np.inf
    for _ in range(ROUNDS):
        counts, likelihood = np.zeros((k, k)), 0.0
        for label in range(k):
            block = q[ends[label] : ends[label + 1]]
            if len(block):
                column = transition[:, label].astype(q.dtype)
                total = np.clip(block @ column, 1e-30, None)
                likelihood += float(np.log(total, dtype=np.float64).sum())
                counts[:, label] = column * (block.T @ (1 / total))
        if likelihood - before < TOLERANCE * n:
            break
        before = likelihood
        transition = update(counts)
    return likelihood, transition


def uniform_transition(counts: np.ndarray) -> np.ndarray:
    """T with one rate for all classes, from counts `[true, given]`."""
    return _with_rate(len(counts), np.trace(counts), counts.sum() - np.trace(counts))


def _with_rate(k: int, right: float, wrong: float) -> np.ndarray:
    """T with one rate, of so many labels that are right and wrong."""
    right, wrong = right + k * PSEUDO_RIGHT, wrong + k * PSEUDO_WRONG
    rate = wrong / (right + wrong)
    return np.where(np.eye(k, dtype=bool), 1 - rate, rate / max(1, k - 1))


def class_transition(counts: np.ndarray) -> np.ndarray:
    """T with a distribution for each class, from counts `[true, given]`."""
    k = len(counts)
    counts = counts + np.where(np.eye(k, dtype=bool), PSEUDO_RIGHT, PSEUDO_WRONG / max(1, k - 1))
    return counts / counts.sum(1, keepdims=True)
