"""Which given labels are right: from the probabilities of a trained network to a probability for each label.

The model. Example i has a true class c, of which the network says q_i(c); its given label y was drawn from T[c, y],
whatever the image. By Bayes' rule

    P(c | x, y) ∝ q(c) · T[c, y]          P(the given label is right) = P(c = y | x, y)

q is made of the network's log-probabilities z in two steps,

    q = softmax(z / τ + A z / τ + b)

- The temperature τ (Guo et al. 2017, "On Calibration of Modern Neural Networks") is what makes trusted labels likely
  that the network was *not* trained with, under the prior log₂ τ ~ N(−¼, 0.35²); a network that was trained with mixup
  is not sure enough, 0.7 to 0.85 were measured. The trusted labels that it was trained with would not do: it has learnt
  them. What the given labels say, the τ that makes them likely under the model above, counts as one measurement of
  log₂ τ with a deviation of 0.75, by which it was off: that matters for networks that were trained so briefly that
  they are far less sure than the prior has it.
- The correction (A, b) is small, and what makes the *given* labels likely under the model above. A network that was
  steered by a handful of trusted images prefers some classes to others that look like them; thousands of labels, most
  of them right, say which. It is matrix scaling (the same paper; with log-probabilities Dirichlet calibration, Kull et
  al. 2019) for labels with noise. Each of its K (K + 1) numbers has the prior N(0, 0.1²), so that it takes many
  examples to move them.

T comes out of expectation-maximisation (Dempster et al. 1977). Two models of it are fitted: *uniform*, in which a wrong
label is any other class, with one parameter, and *by class*, with K (K − 1) of them. The one with the higher Bayesian
information criterion, log-likelihood − ½ · parameters · log N (Schwarz 1978), is used: where labels are wrong at
random, the second takes classes that the network mixes up for classes that the labels mix up.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

TEMPERATURES = 2.0 ** np.arange(-2.5, 1.75, 0.25)
PRIOR_MEAN, PRIOR_DEVIATION = -0.25, 0.35  # of log₂ τ
GIVEN_DEVIATION = 0.75  # of log₂ τ as the given labels have it
CORRECTION_DEVIATION = 0.1  # of each number of the correction
# More classes than these are not corrected, for it has K² numbers.
CORRECTED_CLASSES = 200
EXAMPLES = 20_000  # at most, evenly spaced, that the correction and the measurement of τ take
NEGLIGIBLE = 0.01  # temperatures with less than this of the posterior are left out
ROUNDS, TOLERANCE = 200, 1e-7  # of expectation-maximisation: at most so many, until so little is gained per example
# Of each class, given as itself and as others, besides what is counted: T of a class without examples stays a
# distribution, and where no label seems to be wrong the order of P(right) is still that of q.
PSEUDO_RIGHT, PSEUDO_WRONG = 0.5, 0.05
INTERVAL = 0.95
BINS = 10  # of the reliability plot


@dataclasses.dataclass(frozen=True)
class Quality:
    """What is estimated of N given labels of K classes.

    Attributes:
      right: `[N]` float32, P(given label is right).
      suggested: `[N]` int32, the most probable true class but for the given one: what the label should be if it is
        wrong.
      confidence: `[N]` float32, P(suggested class is the true one).
      transition: `[K, K]`, P(given = j | true = i).
      by_class: whether T was fitted class by class; else a wrong label is any other class.
      noise_rate: the share of the given labels that are wrong.
      noise_interval: (low, high) between which it is with 95 %, as far as temperature and sampling are concerned.
      temperature: τ, the most probable one.
      correction: `[K, K + 1]`, A and then b.
      num_held_out: trusted examples that it was calibrated on; 0 = it is that of the prior.
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
      probabilities: `[N, K]` of the network, rows that sum to 1.
      labels: `[N]` int, as given.
      held_out_probabilities: `[M, K]` likewise, of trusted examples that the network was not trained with.
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
    # The correction at the temperature that is best without one; then the temperature with it.
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
      probabilities: `[n, K]` of the network.
      temperature: τ.
      correction: `[K, K + 1]`, A and then b.
    """
    return _corrected(_log(probabilities) / temperature, correction)


def pooled(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """What several networks say together: the geometric mean of `[n, K]` each, rows that sum to 1; float32."""
    return _softmax(sum(map(_log, predictions)) / len(predictions)).astype(np.float32)


def temperature_weights(
    measured: float, probabilities: np.ndarray | None, labels: np.ndarray | None, correction: np.ndarray
) -> np.ndarray:
    """The posterior of τ on TEMPERATURES: the prior, what the given labels say, the likelihood of held-out labels.

    Args:
      measured: τ as the given labels have it.
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
    """How P(right) does on held-out trusted examples, had they been given labels as T draws them.

    Each of the M true labels c is given as every class y with the weight T[c, y], so nothing is drawn at random:
    M · K pairs, of which those with y = c are right.

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
    """The one of every other of TEMPERATURES that makes given labels the most likely, without a correction."""
    logits = _log(probabilities)
    criteria = [_fit(_softmax(logits / temperature), labels)[0] for temperature in TEMPERATURES[::2]]
    return float(TEMPERATURES[::2][np.argmax(criteria)])


def _correct(probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The most probable correction `[K, K + 1]`, with T as it is without one."""
    from scipy.optimize import minimize

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

    That by the corrected logits of an example is q(c) − P(c | x, y).

    Args:
      correction: `[K, K + 1]`.
      logits: `[N, K]`, z / τ.
      labels: `[N]` int, as given.
      transition: T `[K, K]`.

    Returns:
      The value, without what does not depend on the correction, and `[K, K + 1]`.
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
    """Of the better of the two models: criterion, P(true class | all) `[N, K]`, T `[K, K]`, whether it is by class."""
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
    """Expectation-maximisation: log-likelihood of the labels, P(true class | all) `[N, K]`, T."""
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
    """Quantiles of the mixture, over the temperatures, of normal distributions around the rate at each."""
    from scipy.stats import norm

    used = np.isfinite(rates)
    shares, rates, deviations = weights[used] / weights[used].sum(), rates[used], np.maximum(deviations[used], 1e-9)
    grid = np.linspace(0, 1, 2001)
    cumulative = (shares * norm.cdf((grid[:, None] - rates) / deviations)).sum(1)
    low, high = np.interp([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], np.maximum.accumulate(cumulative), grid)
    return float(low), float(high)
