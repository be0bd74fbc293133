"""Estimates which given labels are right: from the predictions of a network to a probability for each label.

The noise model (`noise_model`) gives the log-odds that a label is right, as if wrong labels depended on the true class
alone. Where there are pairs, examples whose given and true label are both known, a regression on them (`pairs`) takes
its place, which does not assume that.

The interval of the noise rate rests on what there is, the best first:

1. Pairs: the posterior of the regression, as far as 2. allows it. Where the network predicts the given labels of its
   training examples better than those of the pairs, it has memorised them, and the pairs say nothing of what it says on
   the others; then the interval is that of the share of wrong labels among the pairs alone (Clopper and Pearson 1934).
   Where it may be so, the interval holds both.
2. Held-out trusted examples, whose true label is known: the network is wrong on a share e of all examples, of which
   they give an upper bound E. It disagrees with a share D of the given labels. Whatever the noise depends on, the noise
   rate is between D − e and D + e (the triangle inequality of the three labels), so the interval is D ± E.
3. Nothing: from 0 to 3 D. That holds if at least a third of the wrong labels are not memorised.

So without pairs the interval is wider than the noise model would have it: it covers noise that depends on the image.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import expit
from scipy.stats import beta, binom

from ieg_jax.audit import pairs
from ieg_jax.audit.measures import binned
from ieg_jax.audit.noise_model import Fitter, NoiseModel, class_transition, parts, posterior_parts, uniform_transition

UNKNOWN = NO_CLASS = -1  # in `held_out_given` and in `held_out_labels`
INTERVAL = 0.95  # the probability that `noise_interval` covers
DRAWS = 500  # from the posterior of the regression
DRAWN_EXAMPLES = 10_000  # of the given labels, for the interval
FOLDS = 5  # of the pairs, for the reliability
FEWEST_PAIRS = 20  # for the reliability
GUESSING = 0.1  # held-out accuracy with a higher p-value under guessing is near guessing
# Labels that are predicted so much better than others, with a lower p-value, are memorised; or may be.
MEMORISED, PERHAPS_MEMORISED = 0.01, 0.2
MEMORISED_ALONE = 0.1  # without held-out examples: if the network disagrees with less than this share of the labels
SWALLOWED, SWALLOWED_FROM = 0.1, 10  # of a class with so many labels at least, less than this share is predicted


@dataclasses.dataclass(frozen=True)
class Quality:
    """Estimates for N given labels of K classes.

    Attributes:
      right: `[N]` float32, P(given label is right).
      suggested: `[N]` int32, the most probable true class but for the given one: what the label should be if it is
        wrong.
      confidence: `[N]` float32, P(suggested class is the true one).
      transition: `[K, K]`, P(given = j | true = i).
      by_class: whether T was estimated class by class; else a wrong label is any other class with the same probability.
      noise_rate: the share of the given labels that are wrong.
      noise_interval: (low, high), its 95 % interval.
      basis: what the interval rests on: `pairs`, `memorised` (the pairs alone), `held_out` or `nothing`.
      temperature: τ of the noise model.
      num_held_out: how many trusted examples were held out.
      num_pairs: of how many of these the given label is known.
      held_out_accuracy: share of the held-out examples that the network is right on, each class counted as often as it
        occurs among the given labels' true classes; None without any.
      reliability: for each tenth of [0, 1] that has pairs: mean P(right), share that is right, number of pairs; each
        pair judged by estimates that were made without it. Empty with fewer than 20 pairs.
      alarms: sentences, why these estimates should not be relied on; empty where nothing speaks against them.
    """

    right: np.ndarray
    suggested: np.ndarray
    confidence: np.ndarray
    transition: np.ndarray
    by_class: bool
    noise_rate: float
    noise_interval: tuple[float, float]
    basis: str
    temperature: float
    num_held_out: int
    num_pairs: int
    held_out_accuracy: float | None
    reliability: tuple[tuple[float, float, float], ...]
    alarms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """M trusted examples that the network was not trained with; without any, arrays of length 0."""

    probabilities: np.ndarray
    labels: np.ndarray  # NO_CLASS for what is of none
    given: np.ndarray  # UNKNOWN where it is not known

    def take(self, rows: np.ndarray) -> "_HeldOut":
        return _HeldOut(self.probabilities[rows], self.labels[rows], self.given[rows])

    def fit(self, fitter: Fitter) -> NoiseModel:
        known = self.labels != NO_CLASS
        return fitter.fit(self.probabilities[known], self.labels[known])

    @property
    def counts(self) -> np.ndarray:
        """Of each true class, `[K]`."""
        return np.bincount(self.labels[self.labels != NO_CLASS], minlength=self.probabilities.shape[1])

    @property
    def is_pair(self) -> np.ndarray:
        return self.given != UNKNOWN

    @property
    def is_right(self) -> np.ndarray:
        """Whether the network is."""
        return self.probabilities.argmax(1) == self.labels


def estimate(
    probabilities: np.ndarray,
    labels: np.ndarray,
    held_out_probabilities: np.ndarray | None = None,
    held_out_labels: np.ndarray | None = None,
    held_out_given: np.ndarray | None = None,
    held_out_weights: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> Quality:
    """Estimates which labels are right.

    Args:
      probabilities: `[N, K]`, the network's predictions, rows that sum to 1; best by networks that were not trained
        with these examples.
      labels: `[N]` int, as given.
      held_out_probabilities: `[M, K]` likewise, for trusted examples that the network was not trained with.
      held_out_labels: `[M]` int, their true labels; -1 for what is of none of the classes.
      held_out_given: `[M]` int, the labels that these were given; -1 where they are not known, None = of none.
      held_out_weights: `[M]`, how many examples each stands for, where they were drawn so; None = as the shares of
        their true classes ask for it.
      class_names: `[K]`, for the alarms; None = numbers.

    Returns:
      The estimates.

    Raises:
      ValueError: for shapes that do not fit, labels outside 0 … K − 1, and probabilities that are none.
    """
    labels = np.asarray(labels)
    _check(probabilities, labels, "probabilities")
    k = probabilities.shape[1]
    held_out = _held_out(k, held_out_probabilities, held_out_labels, held_out_given)
    fitter = Fitter(probabilities, labels)
    model = held_out.fit(fitter)

    # The noise model.
    n, checked = len(labels), held_out.is_pair
    log_odds, suggested, share, features, counts = _by_noise_model(model, probabilities, labels, checked.any())
    classes = counts.sum(1)
    weights = class_weights(held_out.labels, classes / n)
    if held_out_weights is not None and len(weights):
        weights = np.asarray(held_out_weights, np.float64) / np.mean(held_out_weights)

    # The pairs.
    predicted = probabilities.argmax(1)
    disagreement = float(np.mean(predicted != labels))
    p_value, memorised = _memorised(1 - disagreement, held_out, weights)
    interval = _bounds(disagreement, held_out, weights, classes / n)
    basis, reliability, wrong = "held_out" if len(weights) else "nothing", (), None
    if checked.any():
        known, known_weights = held_out.take(checked), weights[checked]
        regression = _regression(model, features, known, known_weights)
        for rows in parts(n, 64):
            log_odds[rows] = regression.log_odds(features[rows])
        wrong = np.average(known.given != known.labels, weights=known_weights)
        alone = clopper_pearson(wrong, _effective(known_weights))
        if p_value < MEMORISED:
            interval, basis = alone, "memorised"
        else:
            interval, basis = _regression_interval(regression, features, interval, wrong == 0), "pairs"
            if p_value < PERHAPS_MEMORISED:
                interval = min(interval[0], alone[0]), max(interval[1], alone[1])
        if checked.sum() >= FEWEST_PAIRS:
            reliability = _reliability(fitter, held_out, features, weights)
    right = expit(log_odds)
    if checked.any():  # P(right) has changed
        counts[:] = 0
        for rows, _, others in posterior_parts(model, probabilities, labels):
            _count(counts, labels[rows], right[rows], others)
    by_class = model.by_class or checked.any()
    rate = wrong if basis == "memorised" else 1 - right.mean()

    accuracy = float(np.average(held_out.is_right, weights=weights)) if len(weights) else None
    names = list(class_names) if class_names is not None else [str(number) for number in range(k)]
    alarms = [
        *_alarm_guessing(held_out, accuracy, weights),
        *([memorised] if p_value < MEMORISED else []),
        *_alarm_swallowed(predicted, labels, held_out, names),
    ]
    return Quality(
        right=right.astype(np.float32),
        suggested=suggested,
        confidence=(share * (1 - right)).astype(np.float32),
        transition=class_transition(counts) if by_class else uniform_transition(counts),
        by_class=bool(by_class),
        noise_rate=float(rate),
        noise_interval=(min(float(interval[0]), float(rate)), max(float(interval[1]), float(rate))),
        basis=basis,
        temperature=model.temperature,
        num_held_out=len(weights),
        num_pairs=int(checked.sum()),
        held_out_accuracy=accuracy,
        reliability=reliability,
        alarms=tuple(alarms),
    )


def _by_noise_model(model: NoiseModel, probabilities: np.ndarray, labels: np.ndarray, with_features: bool) -> tuple:
    """What the noise model says of N examples.

    Returns:
      The log-odds `[N]` that the label is right; the most probable class but for the given one, `[N]`, and its share
      among these, `[N]`; `pairs.features` `[N, 4]` float32, or None; the expected counts `[true, given]`.
    """
    n, k = probabilities.shape
    log_odds, suggested, share = np.empty(n), np.empty(n, np.int32), np.empty(n)
    features = np.empty((n, 4), np.float32) if with_features else None
    counts = np.zeros((k, k))
    for rows, odds, others in posterior_parts(model, probabilities, labels):
        log_odds[rows], suggested[rows], share[rows] = odds, others.argmax(1), others.max(1)
        if features is not None:
            features[rows] = pairs.features(probabilities[rows], labels[rows], odds, model.temperature)
        _count(counts, labels[rows], expit(odds), others)
    return log_odds, suggested, share, features, counts


def _count(counts: np.ndarray, labels: np.ndarray, right: np.ndarray, others: np.ndarray) -> None:
    """Adds examples to the expected counts `[true, given]`, in which each has the sum 1.

    Args:
      counts: `[K, K]`.
      labels: `[n]`, as given.
      right: `[n]`, P(given label is right).
      others: `[n, K]`, the distribution of the true class where it is wrong; changed.
    """
    others *= (1 - right)[:, None]
    others[np.arange(len(labels)), labels] = right
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    counts.T[present] += np.add.reduceat(others[order], starts)


def class_weights(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How many examples each held-out one stands for, `[M]` with the mean 1, as they may be drawn class by class.

    Args:
      labels: `[M]`, their true labels.
      classes: `[K]`, the share of each true class among the examples that are judged.
    """
    if not len(labels):
        return np.empty(0)
    known = labels != NO_CLASS
    weights = np.ones(len(labels))
    if known.any():
        weights[known] = classes[labels[known]] / np.bincount(labels[known], minlength=len(classes))[labels[known]]
        weights[known] /= max(weights[known].mean(), 1e-12)
    return weights


def clopper_pearson(share: float, n: float) -> tuple[float, float]:
    """The exact interval of a binomial share (Clopper and Pearson 1934), INTERVAL wide.

    Args:
      share: as observed.
      n: of how many; need not be whole, where examples have weights.
    """
    low, high = _quantiles()
    found = share * n
    return (
        float(beta.ppf(low, found, n - found + 1)) if found > 1e-9 else 0.0,
        float(beta.ppf(high, found + 1, n - found)) if n - found > 1e-9 else 1.0,
    )


def _quantiles() -> tuple[float, float]:
    return (1 - INTERVAL) / 2, (1 + INTERVAL) / 2


def _effective(weights: np.ndarray) -> float:
    """The number of examples of equal weight that say as much as these (Kish 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _regression(model: NoiseModel, everywhere: np.ndarray, known: _HeldOut, weights: np.ndarray) -> pairs.Regression:
    scaled = weights * _effective(weights) / weights.sum()
    return pairs.fit(everywhere, _features(model, known), known.given == known.labels, scaled)


def _features(model: NoiseModel, known: _HeldOut) -> np.ndarray:
    log_odds = np.concatenate([odds for _, odds, _ in posterior_parts(model, known.probabilities, known.given)])
    return pairs.features(known.probabilities, known.given, log_odds, model.temperature)


def _held_out(k: int, probabilities, labels, given) -> _HeldOut:
    """The held-out examples as `estimate` takes them, checked."""
    if labels is None or not len(labels):
        return _HeldOut(np.empty((0, k), np.float32), np.empty(0, int), np.empty(0, int))
    true = np.asarray(labels)
    _check(probabilities, true, "held_out_probabilities", NO_CLASS)
    given = np.full(len(true), UNKNOWN) if given is None else np.asarray(given)
    if given.shape != true.shape or given.min() < UNKNOWN or given.max() >= k:
        raise ValueError(f"held_out_given: shape {given.shape}, expected {true.shape}, each -1 to {k - 1}")
    return _HeldOut(probabilities, true, given)


def _regression_interval(
    regression: pairs.Regression, features: np.ndarray, bounds: tuple[float, float], none_wrong: bool
) -> tuple[float, float]:
    """The interval by the regression, inside of `bounds`; where no pair is wrong, maybe no label is."""
    n = len(features)
    some = features[np.linspace(0, n - 1, min(n, DRAWN_EXAMPLES)).astype(int)]
    rates = regression.noise_rates(some, n, DRAWS, np.random.default_rng(0))
    low, high = np.clip(np.quantile(rates, _quantiles()), *bounds)
    return (min(low, bounds[0]) if none_wrong else low), high


def _reliability(fitter: Fitter, held_out: _HeldOut, everywhere: np.ndarray, weights: np.ndarray) -> tuple:
    """`Quality.reliability`: the pairs in FOLDS parts, each judged by what was fitted to the others."""
    checked = np.flatnonzero(held_out.is_pair)
    part = np.full(len(held_out.labels), -1)
    part[np.random.default_rng(0).permutation(checked)] = np.arange(len(checked)) % FOLDS
    right = np.empty(len(part))
    for number in range(FOLDS):
        rest, mine = held_out.take(part != number), held_out.take(part == number)
        model = rest.fit(fitter)
        others = (part != number) & held_out.is_pair
        regression = _regression(model, everywhere, held_out.take(others), weights[others])
        right[part == number] = expit(regression.log_odds(_features(model, mine)))
    known = held_out.take(checked)
    return tuple(binned(right[checked], known.given == known.labels, weights[checked]))


def _bounds(disagreement: float, held_out: _HeldOut, weights: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """The interval without pairs, see above; of classes without a held-out example the network may always be wrong."""
    if not len(weights):
        return 0.0, min(1.0, 3 * disagreement)
    unseen = classes[held_out.counts == 0].sum()
    wrong = np.average(~held_out.is_right, weights=weights)
    bound = unseen + (1 - unseen) * clopper_pearson(wrong, _effective(weights))[1]
    return max(0.0, disagreement - bound), min(1.0, disagreement + bound)


def _memorised(agrees: float, held_out: _HeldOut, weights: np.ndarray) -> tuple[float, str]:
    """Whether the network predicts the given labels better than it would if it did not know them.

    What it would do the pairs show. Without pairs it is at most what it does on true labels.

    Args:
      agrees: the share of the given labels that it predicts.
      held_out: M trusted examples.
      weights: `[M]`.

    Returns:
      The p-value that it does no better, and the alarm that this may need.
    """
    if not len(weights):
        text = (
            f"the network predicts {agrees:.0%} of the labels, and no trusted example was held out: whether it has "
            f"learnt these labels by heart nothing can show"
        )
        return (0.0, text) if agrees > 1 - MEMORISED_ALONE else (1.0, "")
    checked = held_out.is_pair
    rows = checked if checked.any() else np.ones(len(weights), bool)
    targets = held_out.given if checked.any() else held_out.labels
    elsewhere = float(np.average((held_out.probabilities.argmax(1) == targets)[rows], weights=weights[rows]))
    n = round(_effective(weights[rows]))
    of_what = "given labels of checked examples" if checked.any() else "true labels of held-out trusted examples"
    text = (
        f"the network reproduces the labels that it was trained on: it predicts {agrees:.0%} of them, and "
        f"{elsewhere:.0%} of the {of_what}, with which it was not trained"
    )
    return float(binom.cdf(np.round(elsewhere * n), n, agrees)), text


def _alarm_guessing(held_out: _HeldOut, accuracy: float | None, weights: np.ndarray) -> list[str]:
    if accuracy is None or held_out.is_right.all():
        return []
    k, n = held_out.probabilities.shape[1], round(_effective(weights))
    half_way = (
        1 + 1 / k
    ) / 2 - 1e-9  # from guessing to always right; of 3 examples of 3 classes no share is significant
    if binom.sf(np.round(accuracy * n) - 1, n, 1 / k) < GUESSING or accuracy >= half_way:
        return []
    return [
        f"the network is hardly better than guessing: its accuracy on held-out trusted examples is {accuracy:.0%}, "
        f"guessing would give {1 / k:.0%}"
    ]


def _alarm_swallowed(predicted: np.ndarray, labels: np.ndarray, held_out: _HeldOut, names: list[str]) -> list[str]:
    """Of classes that are predicted far less often than given, unless held-out examples of them are recognised."""
    k = len(names)
    given, found = np.bincount(labels, minlength=k), np.bincount(predicted, minlength=k)
    recognised = held_out.take(held_out.is_right).counts > held_out.counts / 2
    alarms = []
    for c in np.flatnonzero((given >= SWALLOWED_FROM) & (found < SWALLOWED * given) & ~recognised):
        instead = np.bincount(predicted[labels == c], minlength=k).argmax()
        times = "never" if found[c] == 0 else f"only {found[c]} times"
        alarms.append(
            f"the class {names[c]} is {times} predicted, though {given[c]} labels name it; {names[instead]} is "
            f"predicted in its place"
        )
    return alarms


def _check(probabilities: np.ndarray, labels: np.ndarray, name: str, lowest: int = 0) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"{name}: shape {probabilities.shape} and labels {labels.shape}, expected [n, K] and [n], n > 0"
        )
    if labels.min() < lowest or labels.max() >= probabilities.shape[1]:
        raise ValueError(
            f"labels of {name}: {labels.min()} to {labels.max()}, expected {lowest} to {probabilities.shape[1] - 1}"
        )
    low, high = probabilities.min(), probabilities.max()
    if not (low >= 0 and high <= 1 + 1e-3):
        raise ValueError(f"{name}: values from {low} to {high}, expected probabilities, from 0 to 1")
