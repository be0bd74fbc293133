"""Estimates which given labels are right: from the probabilities of a trained network to a probability for each label.

The model: example i has a true class c, for which the network gives the probability q_i(c). Its given label y was drawn
from T[c, y], whatever the image. By Bayes' rule

    P(c | x, y) ∝ q(c) · T[c, y]          P(the given label is right) = P(c = y | x, y)

q is made of the network's log-probabilities z in two steps,

    q = softmax(z / τ + A z / τ + b)

- The temperature τ (Guo et al. 2017, "On Calibration of Modern Neural Networks") is chosen so that trusted labels with
  which the network was *not* trained become likely; those that it was trained with it has learnt. The prior is
  log₂ τ ~ N(−¼, 0.35²), as a network that was trained with mixup is not sure enough: values of τ from 0.7 to 0.85 were
  measured. The τ that makes the given labels likely under the model above counts as one measurement of log₂ τ, with a
  standard deviation of 0.75, as it was off by so much. It matters for networks that were trained so briefly that they
  are far less sure than the prior assumes.
- The correction (A, b) is small, and is chosen so that the *given* labels become likely under the model above. A
  network that was steered by a handful of trusted images prefers some classes to others that look like them; thousands
  of labels, most of them right, show which. This is matrix scaling (the same paper; with log-probabilities it is
  Dirichlet calibration, Kull et al. 2019) for labels with noise. Each of its K (K + 1) numbers has the prior N(0,
  0.1²), so that it takes many examples to move them.

T is fitted by expectation-maximisation (Dempster et al. 1977), in two models: *uniform*, in which a wrong label is any
other class with the same probability, with one parameter, and *by class*, with K (K − 1) of them. The one with the
higher Bayesian information criterion, log-likelihood − ½ · parameters · log N (Schwarz 1978), is used. The second is
not always better: where labels are wrong at random, it takes classes that the network mixes up for classes that the
labels mix up.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

TEMPERATURES = 2.0 ** np.arange(-2.5, 1.75, 0.25)  # the values of τ that are tried
PRIOR_MEAN, PRIOR_DEVIATION = -0.25, 0.35  # of log₂ τ
GIVEN_DEVIATION = 0.75  # of log₂ τ as measured with the given labels
CORRECTION_DEVIATION = 0.1  # of the prior of each number of the correction
CORRECTED_CLASSES = 200  # with more classes there is no correction, as it has K (K + 1) numbers
EXAMPLES = 20_000  # the correction and the measurement of τ take no more examples than these, evenly spaced
NEGLIGIBLE = 0.01  # temperatures that are less than this times as probable as the most probable one are left out
# Expectation-maximisation ends after so many rounds, or when a round gains less log-likelihood than this per example.
ROUNDS, TOLERANCE = 200, 1e-7
# For each class, so many examples are added to those that are counted: given as itself, and given as others. So T is a
# distribution for a class without examples too, and where no label seems to be wrong P(right) is still ordered as q.
PSEUDO_RIGHT, PSEUDO_WRONG = 0.5, 0.05
INTERVAL = 0.95  # the probability that `noise_interval` covers
BINS = 10  # of the reliability plot


@dataclasses.dataclass(frozen=True)
class Quality:
    """Estimates for N given labels of K classes.

    Attributes:
      right: `[N]` float32, P(given label is right).
      suggested: `[N]` int32, the most probable true class but for the given one: what the label should be if it is
        wrong.
      confidence: `[N]` float32, P(suggested class is the true one).
      transition: `[K, K]`, P(given = j | true = i).
      by_class: whether T was fitted class by class; else a wrong label is any other class with the same probability.
      noise_rate: the share of the given labels that are wrong.
      noise_interval: (low, high), its 95 % interval, as far as temperature and sampling are concerned.
      temperature: the most probable τ.
      correction: `[K, K + 1]`, A and then b.
      num_held_out: how many trusted examples τ was calibrated on.
    """

    right: np.ndarray
    suggested: np.ndarray
    confidence: np.ndarray
    transition: np.ndarray
    by_class: bool
    noise_rate: float
    noise_interval: tuple[float, float]
    temperature: float
    correction: np.ndarray
    num_held_out: int


def estimate(
    probabilities: np.ndarray,
    labels: np.ndarray,
    held_out_probabilities: np.ndarray | None = None,
    held_out_labels: np.ndarray | None = None,
) -> Quality:
    """Estimates which labels are right.

    Args:
      probabilities: `[N, K]`, the network's predictions, rows that sum to 1.
      labels: `[N]` int, as given.
      held_out_probabilities: `[M, K]` likewise, for trusted examples that the network was not trained with.
      held_out_labels: `[M]` int, their true labels.

    Returns:
      The estimates.

    Raises:
      ValueError: for shapes that do not fit, and labels outside 0 … K − 1.
    """
    labels = np.asarray(labels)
    _check(probabilities, labels, "probabilities")
    num_held_out = 0 if held_out_labels is None else len(held_out_labels)
    if num_held_out:
        _check(held_out_probabilities, np.asarray(held_out_labels), "held_out_probabilities")
    # First the correction, at the temperature that is best without one; then the temperature with this correction.
    none = np.zeros((probabilities.shape[1], probabilities.shape[1] + 1))
    rows = np.linspace(0, len(labels) - 1, min(len(labels), EXAMPLES)).astype(int)
    some, given = probabilities[rows], labels[rows]
    measured = _measured_temperature(some, given)
    first = TEMPERATURES[temperature_weights(measured, held_out_probabilities, held_out_labels, none).argmax()]
    correction = _correct(some, given, first) if len(none) <= CORRECTED_CLASSES else none
    weights = temperature_weights(measured, held_out_probabilities, held_out_labels, correction)
    best = int(weights.argmax())
    rates = np.full(len(TEMPERATURES), np.nan)
    deviations = np.full(len(TEMPERATURES), np.nan)
    found = None
    for number in np.flatnonzero(weights > NEGLIGIBLE * weights.max()):
        _, posterior, transition, by_class = _fit(calibrated(probabilities, TEMPERATURES[number], correction), labels)
        right = posterior[np.arange(len(labels)), labels]
        rates[number] = 1 - right.mean()
        deviations[number] = np.sqrt(np.sum(right * (1 - right))) / len(labels)
        if number == best:
            found = right, posterior, transition, by_class
    right, posterior, transition, by_class = found
    posterior[np.arange(len(labels)), labels] = -1.0
    return Quality(
        right=right.astype(np.float32),
        suggested=posterior.argmax(1).astype(np.int32),
        confidence=posterior.max(1).astype(np.float32),
        transition=transition,
        by_class=by_class,
        noise_rate=float(rates[best]),
        noise_interval=_interval(rates, deviations, weights),
        temperature=float(TEMPERATURES[best]),
        correction=correction,
        num_held_out=num_held_out,
    )


def calibrated(probabilities: np.ndarray, temperature: float, correction: np.ndarray) -> np.ndarray:
    """The model's q: softmax((I + A) log p / τ + b), `[n, K]` float64.

    Args:
      probabilities: p, `[n, K]`, the network's predictions.
      temperature: τ.
      correction: `[K, K + 1]`, A and then b.
    """
    return _corrected(_log(probabilities) / temperature, correction)


def pooled(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """The geometric mean of the predictions of several networks, `[n, K]` each; float32, rows that sum to 1."""
    return _softmax(sum(map(_log, predictions)) / len(predictions)).astype(np.float32)


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
            np.log(np.clip(calibrated(probabilities, temperature, correction)[rows, labels], 1e-12, None)).sum()
            for temperature in TEMPERATURES
        ]
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def reliability(
    quality: Quality, held_out_probabilities: np.ndarray, held_out_labels: np.ndarray
) -> list[tuple[float, float, float]]:
    """How reliable P(right) would be on held-out trusted examples if they had been given labels as T draws them.

    Nothing is drawn at random: each of the M true labels c is given as every class y with the weight T[c, y]. Of these
    M · K pairs those with y = c are right.

    Args:
      quality: from `estimate`.
      held_out_probabilities: `[M, K]`.
      held_out_labels: `[M]`.

    Returns:
      For each tenth of [0, 1] that has any weight: mean P(right), the share that is right, the weight in examples.
    """
    prior = calibrated(held_out_probabilities, quality.temperature, quality.correction)
    k = prior.shape[1]
    joint = prior[:, :, None] * quality.transition  # [M, true, given]
    right = np.einsum("mkk->mk", joint) / np.clip(joint.sum(1), 1e-300, None)  # [M, given]
    weights = quality.transition[held_out_labels]
    truth = np.arange(k) == np.asarray(held_out_labels)[:, None]
    return binned(right.ravel(), truth.ravel(), weights.ravel())


def binned(
    predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None
) -> list[tuple[float, float, float]]:
    """(mean prediction, mean truth, weight) in each of BINS equal parts of [0, 1] that is not empty.

    Args:
      predicted: `[n]` probabilities.
      truth: `[n]` bool.
      weights: `[n]`; None = 1 each.
    """
    weights = np.ones(len(predicted)) if weights is None else weights
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    sums = [np.bincount(bins, values, BINS) for values in (weights * predicted, weights * truth, weights)]
    return [(float(p / w), float(t / w), float(w)) for p, t, w in zip(*sums, strict=True) if w > 1e-9]


def calibration_error(bins: list[tuple[float, float, float]]) -> float:
    """Expected calibration error (Naeini et al. 2015): the mean distance between prediction and truth."""
    total = sum(weight for *_, weight in bins)
    return sum(abs(predicted - truth) * weight for predicted, truth, weight in bins) / total


def _check(probabilities: np.ndarray, labels: np.ndarray, name: str) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"{name}: shape {probabilities.shape} and labels {labels.shape}, expected [n, K] and [n], n > 0"
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels of {name}: {labels.min()} to {labels.max()}, expected 0 to {probabilities.shape[1] - 1}"
        )


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.clip(probabilities.astype(np.float64), 1e-12, None))


def _corrected(logits: np.ndarray, correction: np.ndarray) -> np.ndarray:
    return _softmax(logits + logits @ correction[:, :-1].T + correction[:, -1])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _measured_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The τ that makes the given labels the most likely, without a correction; every other of TEMPERATURES is tried."""
    logits = _log(probabilities)
    criteria = [_fit(_softmax(logits / temperature), labels)[0] for temperature in TEMPERATURES[::2]]
    return float(TEMPERATURES[::2][np.argmax(criteria)])


def _correct(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The most probable correction `[K, K + 1]`; T is kept as it is without a correction."""
    logits = _log(probabilities) / temperature
    shape = logits.shape[1], logits.shape[1] + 1
    transition = _fit(_softmax(logits), labels)[2]

    def loss(flat):
        value, gradient = correction_loss(flat.reshape(shape), logits, labels, transition)
        return value, gradient.ravel()

    return minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B").x.reshape(shape)


def correction_loss(
    correction: np.ndarray, logits: np.ndarray, labels: np.ndarray, transition: np.ndarray
) -> tuple[float, np.ndarray]:
    """−log of the likelihood Π_i Σ_c q_i(c) T[c, y_i] times the prior of the correction, and its gradient.

    The gradient with respect to the corrected logits of an example is q(c) − P(c | x, y).

    Args:
      correction: `[K, K + 1]`.
      logits: `[N, K]`, z / τ.
      labels: `[N]` int, as given.
      transition: T `[K, K]`.

    Returns:
      The value, without the terms that do not depend on the correction, and the gradient `[K, K + 1]`.
    """
    q = _corrected(logits, correction)
    joint = q * transition[:, labels].T
    total = np.clip(joint.sum(1, keepdims=True), 1e-300, None)
    by_logits = q - joint / total
    gradient = np.concatenate([by_logits.T @ logits, by_logits.sum(0)[:, None]], 1)
    precision = CORRECTION_DEVIATION**-2
    value = -np.log(total).sum() + 0.5 * precision * np.square(correction).sum()
    return float(value), gradient + precision * correction


def _fit(prior: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, bool]:
    """Fits both models of T and returns the better one.

    Returns:
      Its criterion, P(true class | image, given label) `[N, K]`, T `[K, K]`, and whether it is the one by class.
    """
    n, k = prior.shape
    penalty = 0.5 * np.log(n)
    uniform, by_class = (_maximise(prior, labels, update) for update in (_uniform, _by_class))
    found = (uniform[0] - penalty, *uniform[1:], False), (by_class[0] - k * (k - 1) * penalty, *by_class[1:], True)
    return max(found, key=lambda one: one[0])


def _uniform(counts: np.ndarray) -> np.ndarray:
    """T with one rate for all classes, from counts `[true, given]`."""
    k = len(counts)
    right, wrong = np.trace(counts) + k * PSEUDO_RIGHT, counts.sum() - np.trace(counts) + k * PSEUDO_WRONG
    rate = wrong / (right + wrong)
    return np.where(np.eye(k, dtype=bool), 1 - rate, rate / max(1, k - 1))


def _by_class(counts: np.ndarray) -> np.ndarray:
    """T with a distribution for each class, from counts `[true, given]`."""
    k = len(counts)
    counts = counts + np.where(np.eye(k, dtype=bool), PSEUDO_RIGHT, PSEUDO_WRONG / max(1, k - 1))
    return counts / counts.sum(1, keepdims=True)


def _maximise(
    prior: np.ndarray, labels: np.ndarray, update: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Expectation-maximisation.

    Args:
      prior: q, `[N, K]`.
      labels: `[N]`, as given.
      update: counts `[true, given]` -> T, `_uniform` or `_by_class`.

    Returns:
      The log-likelihood of the labels, P(true class | image, given label) `[N, K]`, and T `[K, K]`.
    """
    n, k = prior.shape
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(k))
    present = np.bincount(labels, minlength=k) > 0
    transition = np.where(np.eye(k, dtype=bool), 0.7, 0.3 / max(1, k - 1))
    before = -np.inf
    for _ in range(ROUNDS):
        posterior = prior * transition[:, labels].T
        total = posterior.sum(1)
        posterior /= total[:, None]
        likelihood = float(np.log(total).sum())
        if likelihood - before < TOLERANCE * n:
            break
        before = likelihood
        counts = np.zeros((k, k))  # [given, true]
        counts[present] = np.add.reduceat(posterior[order], starts[present])
        transition = update(counts.T)
    return likelihood, posterior, transition


def _interval(rates: np.ndarray, deviations: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Quantiles of a mixture of normal distributions: one for each temperature, around the noise rate found with it."""
    used = np.isfinite(rates)
    shares, rates, deviations = weights[used] / weights[used].sum(), rates[used], np.maximum(deviations[used], 1e-9)
    grid = np.linspace(0, 1, 2001)
    cumulative = (shares * norm.cdf((grid[:, None] - rates) / deviations)).sum(1)
    low, high = np.interp([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], np.maximum.accumulate(cumulative), grid)
    return float(low), float(high)


def divergence(probabilities: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence of V distributions (Lin 1991), H(mean) − mean H, divided by its largest value, log V.

    Args:
      probabilities: `[V, n, K]`.

    Returns:
      `[n]` float32 in [0, 1]; zeros where V is 1.
    """
    if len(probabilities) == 1:
        return np.zeros(probabilities.shape[1], np.float32)

    def entropy(p):
        return -np.sum(p * np.log(np.clip(p, 1e-12, None)), -1)

    values = entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)
    return np.clip(values / np.log(len(probabilities)), 0, 1).astype(np.float32)


def judge(right: np.ndarray, suggested: np.ndarray, given: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Judges estimates where the true labels are known.

    Args:
      right: `[n]` P(given label is right), or any score that is higher for labels that are right.
      suggested: `[n]`, what the label should be if it is wrong.
      given: `[n]`.
      true: `[n]`.

    Returns:
      `noise_rate`, the true one. Where there are wrong labels and right ones, also: `auroc`, the area under the ROC
      curve of `right`; `precision`, the share of wrong labels among those with the lowest `right`, as many as there are
      wrong ones; `suggested_right`, the share of the wrong labels whose suggestion is true.
    """
    wrong = given != true
    found = {"noise_rate": float(wrong.mean())}
    if 0 < wrong.sum() < len(wrong):
        first = np.argsort(right, kind="stable")[: wrong.sum()]
        found["auroc"] = float(roc_auc_score(wrong, -right))
        found["precision"] = float(wrong[first].mean())
        found["suggested_right"] = float((suggested == true)[wrong].mean())
    return found
