"""Which given labels are right: from the probabilities of a trained network to a probability for each label.

The model. Example i has a true class c, of which the network says q_i(c); its given label y was drawn from T[c, y],
whatever the image. By Bayes' rule

    P(c | x, y) ∝ q(c) · T[c, y]          P(the given label is right) = P(c = y | x, y)

q is the network's softmax with its logits divided by a temperature τ (Guo et al. 2017, "On Calibration of Modern Neural
Networks"): τ is what makes trusted labels likely that the network was *not* trained with, under the prior
log₂ τ ~ N(−¼, 0.35²); a network that was trained with mixup is not sure enough, 0.7 to 0.85 were measured. The labels
that it was trained with would not do, trusted or given: it has learnt them.

T comes out of expectation-maximisation (Dempster et al. 1977). Two models of it are fitted: *uniform*, in which a wrong
label is any other class, with one parameter, and *by class*, with K (K − 1) of them. The one with the higher Bayesian
information criterion, log-likelihood − ½ · parameters · log N (Schwarz 1978), is used: where labels are wrong at
random, the second takes classes that the network mixes up for classes that the labels mix up.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

TEMPERATURES = 2.0 ** np.arange(-2.5, 1.75, 0.25)
PRIOR_MEAN, PRIOR_DEVIATION = -0.25, 0.35  # of log₂ τ
NEGLIGIBLE = 0.01  # temperatures with less than this of the posterior are left out
ROUNDS, TOLERANCE = 200, 1e-7  # of expectation-maximisation: at most so many, until so little is gained per example
PSEUDO_COUNT = 0.1  # of a class given as itself: T of a class without examples stays a distribution
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
    weights = temperature_weights(held_out_probabilities, held_out_labels)
    best = int(weights.argmax())
    rates = np.full(len(TEMPERATURES), np.nan)
    deviations = np.full(len(TEMPERATURES), np.nan)
    found = None
    for number in np.flatnonzero(weights > NEGLIGIBLE * weights.max()):
        posterior, transition, by_class = _fit(sharpen(probabilities, TEMPERATURES[number]), labels)
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
        num_held_out=num_held_out,
    )


def sharpen(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / τ), `[n, K]` float64."""
    logits = np.log(np.clip(probabilities.astype(np.float64), 1e-12, None)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def temperature_weights(probabilities: np.ndarray | None, labels: np.ndarray | None) -> np.ndarray:
    """The posterior of τ on TEMPERATURES: the prior, times the likelihood of held-out labels where there are any.

    Args:
      probabilities: `[M, K]`, or None.
      labels: `[M]`, or None.

    Returns:
      `[len(TEMPERATURES)]`, sums to 1.
    """
    log_weights = -0.5 * ((np.log2(TEMPERATURES) - PRIOR_MEAN) / PRIOR_DEVIATION) ** 2
    if labels is not None and len(labels):
        rows = np.arange(len(labels))
        log_weights = log_weights + [
            np.log(np.clip(sharpen(probabilities, temperature)[rows, labels], 1e-12, None)).sum()
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
    prior = sharpen(held_out_probabilities, quality.temperature)
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


def _fit(prior: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """P(true class | all) `[N, K]`, T `[K, K]` and whether that is by class, of the better of the two models."""
    n, k = prior.shape
    penalty = 0.5 * np.log(n)
    uniform, by_class = (_maximise(prior, labels, update) for update in (_uniform, _by_class))
    if by_class[0] - k * (k - 1) * penalty > uniform[0] - penalty:
        return *by_class[1:], True
    return *uniform[1:], False


def _uniform(counts: np.ndarray) -> np.ndarray:
    """T with one rate for all classes, from counts `[true, given]`."""
    k = len(counts)
    rate = 1 - (np.trace(counts) + PSEUDO_COUNT) / (counts.sum() + PSEUDO_COUNT)
    return np.where(np.eye(k, dtype=bool), 1 - rate, rate / (k - 1))


def _by_class(counts: np.ndarray) -> np.ndarray:
    """T with a distribution for each class, from counts `[true, given]`."""
    counts = counts + PSEUDO_COUNT * np.eye(len(counts))
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
