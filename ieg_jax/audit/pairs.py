"""What checked pairs teach: from examples whose given *and* true label are known to P(the given label is right).

Wrong labels in the world depend on the image, of which the noise model (`noise_model`) knows nothing. With pairs one
can do without its assumptions: whether the given label is right is a logistic regression on what the network says,

    logit P(right) = α + β₁ · log-odds of the noise model + β₂ · log-margin / τ + β₃ · log P(given) + β₄ · entropy

Few pairs should change little. So the coefficients have normal priors around (1, 0, 0, 0), where the noise model is
right, which is the most probable, around (0, 1, 0, 0), where the margin of the given class says all there is, and
around (½, ½, 0, 0); each with several deviations. What these twelve say is averaged with their evidence, the
probability of the pairs under each (Laplace's approximation; MacKay 1992, "Bayesian Interpolation"). α has the prior
N(0, 3²).
"""

import dataclasses

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, softmax

from ieg_jax.audit.noise_model import LOWEST

# Around which β₁ and β₂ are expected, and with which deviations: of what a feature adds to the logit, in units of the
# deviation of the noise model's log-odds.
CENTRES = {(1.0, 0.0): 0.6, (0.5, 0.5): 0.25, (0.0, 1.0): 0.15}  # with their prior probabilities
DEVIATIONS = (0.03, 0.1, 0.3, 1.0)
INTERCEPT_DEVIATION = 3.0
SUREST = 12.0  # log-odds of the noise model beyond this count as this


@dataclasses.dataclass(frozen=True)
class Regression:
    """The regressions, C of them, F features.

    Attributes:
      shift, scale: `[F]`, features are (x − shift) / scale.
      coefficients: `[C, 1 + F]`, α and β.
      covariances: `[C, 1 + F, 1 + F]`.
      weights: `[C]`, their evidence times their prior probability; sums to 1.
    """

    shift: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    covariances: np.ndarray
    weights: np.ndarray

    def log_odds(self, features: np.ndarray) -> np.ndarray:
        """The logit of P(right) `[n]` of features `[n, F]`, the mean of the regressions."""
        return self._design(features) @ (self.weights @ self.coefficients)

    def noise_rates(self, features: np.ndarray, total: int, draws: int, rng: np.random.Generator) -> np.ndarray:
        """The share of wrong labels, `[draws]` from the posterior.

        Args:
          features: `[n, F]` of examples, all or some of them.
          total: the number of all, N; with few of them, the share varies by chance too.
          draws: how many.
          rng: of numpy.
        """
        design, rates = self._design(features), []
        for component, number in enumerate(rng.multinomial(draws, self.weights)):
            coefficients = rng.multivariate_normal(self.coefficients[component], self.covariances[component], number)
            for drawn in coefficients:
                wrong = expit(-design @ drawn)
                rates.append(wrong.mean() + rng.normal() * np.sqrt((wrong * (1 - wrong)).mean() / total))
        return np.clip(rates, 0, 1)

    def _design(self, features: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((len(features), 1)), (features - self.shift) / self.scale], 1)


def features(probabilities: np.ndarray, labels: np.ndarray, log_odds: np.ndarray, temperature: float) -> np.ndarray:
    """What P(right) is made of, `[n, 4]`.

    Args:
      probabilities: `[n, K]`, the network's predictions.
      labels: `[n]`, as given.
      log_odds: `[n]`, of the noise model.
      temperature: τ of the noise model.
    """
    rows = np.arange(len(labels))
    p = np.clip(probabilities, LOWEST, None).astype(np.float64)
    logs = np.log(p)
    entropy = -(p * logs).sum(1)
    given = logs[rows, labels]
    logs[rows, labels] = -np.inf
    margin = (given - logs.max(1)) / temperature
    return np.stack([np.clip(log_odds, -SUREST, SUREST), margin, given, entropy], 1)


def fit(everywhere: np.ndarray, checked: np.ndarray, is_right: np.ndarray, weights: np.ndarray) -> Regression:
    """Fits the regressions.

    Args:
      everywhere: `[N, F]` features of all examples, for their scale.
      checked: `[M, F]` features of the pairs.
      is_right: `[M]` bool, whether the given label of the pair is its true one.
      weights: `[M]`, how many examples each pair counts as.
    """
    # The first two are log-odds and only shifted, so that their coefficients mean what the priors say.
    # Column by column in float64: sums of millions of float32 in float32 are off.
    shift = np.array([column.mean(dtype=np.float64) for column in everywhere.T])
    deviation = np.maximum([column.std(dtype=np.float64) for column in everywhere.T], 1e-3)
    shift[:2] = 0
    scale = np.where(np.arange(len(shift)) < 2, 1.0, deviation)
    spread = deviation[0] / deviation * scale  # of a coefficient that changes the logit as much as the first does
    design = np.concatenate([np.ones((len(checked), 1)), (checked - shift) / scale], 1)
    found = []
    for centre, probability in CENTRES.items():
        mean = np.array([0.0, *centre, *[0.0] * (len(shift) - 2)])
        for factor in DEVIATIONS:
            prior = np.array([INTERCEPT_DEVIATION, *(factor * spread)])
            evidence, *posterior = laplace(design, is_right, weights, mean, prior)
            found.append((evidence + np.log(probability), *posterior))
    evidence, coefficients, covariances = (np.array(part) for part in zip(*found, strict=True))
    return Regression(shift, scale, coefficients, covariances, softmax(evidence))


def laplace(
    design: np.ndarray, is_right: np.ndarray, weights: np.ndarray, mean: np.ndarray, deviations: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Logistic regression with a normal prior, by Laplace's approximation.

    Args:
      design: `[M, D]`.
      is_right: `[M]` bool.
      weights: `[M]`.
      mean: `[D]` of the prior.
      deviations: `[D]` of the prior.

    Returns:
      The log-evidence, the most probable coefficients `[D]`, and their covariance `[D, D]`.
    """
    sign = np.where(is_right, 1.0, -1.0)

    def loss(coefficients):
        margin = sign * (design @ coefficients)
        away = (coefficients - mean) / deviations
        value = (weights * np.logaddexp(0, -margin)).sum() + 0.5 * (away**2).sum()
        return value, -design.T @ (weights * sign * expit(-margin)) + away / deviations

    found = minimize(loss, mean, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    p = expit(design @ found)
    hessian = (design * (weights * p * (1 - p))[:, None]).T @ design + np.diag(deviations**-2.0)
    evidence = -loss(found)[0] - 0.5 * np.linalg.slogdet(hessian)[1] - np.log(deviations).sum()
    return float(evidence), found, np.linalg.inv(hessian)
