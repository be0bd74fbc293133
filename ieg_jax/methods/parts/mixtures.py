"""Two-component mixtures on the losses of all training examples: whose labels are wrong, those of large losses.

They are fitted on the host at the end of an epoch, by expectation and maximisation.
"""

from typing import NamedTuple

import numpy as np

EDGE = 1e-3  # losses are brought into [EDGE, 1 − EDGE], where a beta distribution has a density
STEPS = 10


class BetaMixture(NamedTuple):
    """Two beta distributions, the one of large losses second."""

    shapes: np.ndarray  # [2, 2], α and β of each
    shares: np.ndarray  # [2], which sum to 1

    def means(self) -> np.ndarray:
        """`[2]`, in order."""
        return self.shapes[:, 0] / self.shapes.sum(1)

    def posteriors(self, losses: np.ndarray) -> np.ndarray:
        """Bayes' rule: `[N]` in (0, 1) -> `[2, N]`."""
        from scipy.stats import beta  # takes a second, and all that reads flags comes by here

        weighted = [share * beta.pdf(losses, *shape) for share, shape in zip(self.shares, self.shapes, strict=True)]
        weighted = np.maximum(np.stack(weighted), 1e-12)
        return weighted / weighted.sum(0)

    def of_large(self, losses: np.ndarray) -> np.ndarray:
        """P(large-loss component | loss): `[N]` in (0, 1) -> `[N]`, which rises with the loss.

        Where a wide component has more weight than a narrow one at both its sides, it stays what it was: below the
        least posterior of losses under the second mean, and above each one that is larger.
        """
        order = np.argsort(losses, kind="stable")
        along = self.posteriors(losses[order])[1]
        lowest = np.argmin(along[: max(1, np.searchsorted(losses[order], self.means()[1]))])
        along[:lowest] = along[lowest]
        found = np.empty_like(along)
        found[order] = np.maximum.accumulate(along)
        return np.clip(found, EDGE, 1 - EDGE)


def fit_betas(losses: np.ndarray, steps: int = STEPS) -> BetaMixture:
    """Fits a mixture to losses in (0, 1) by expectation and maximisation, from Beta(1, 2) and Beta(2, 1) on.

    Arazo et al. (2019), section 3.1: the expectation step is Bayes' rule, the maximisation step the weighted method of
    moments. Ten steps, as in the published code, are not the most likely mixture yet, but where losses are not betas
    that one may have a component of no more than a few losses that are alike.

    Args:
      losses: `[N]`.
      steps: how many.
    """
    mixture = BetaMixture(np.array([[1.0, 2.0], [2.0, 1.0]]), np.full(2, 0.5))
    for _ in range(steps):
        shapes, posteriors = np.empty((2, 2)), mixture.posteriors(losses)
        for number, weights in enumerate(posteriors):
            mean = np.average(losses, weights=weights)
            variance = max(np.average((losses - mean) ** 2, weights=weights), 1e-6)
            factor = max(mean * (1 - mean) / variance - 1, 1e-2)
            shapes[number] = mean * factor, (1 - mean) * factor
        mixture = BetaMixture(shapes, posteriors.mean(1))
    order = np.argsort(mixture.means(), kind="stable")
    return BetaMixture(mixture.shapes[order], mixture.shares[order])


def large_losses(losses: np.ndarray) -> np.ndarray:
    """P(large-loss component | loss) for losses of any size: `[N]` -> `[N]` in (0, 1).

    The mixture is fitted without the 5 % least and the 5 % largest, which would be two heaps at the ends; then all
    losses are judged by it. As in the published code of Arazo et al. (2019).
    """
    low, high = np.percentile(losses, (5, 95))
    scaled = np.clip((losses - low) / max(high - low, 1e-12), EDGE, 1 - EDGE)
    return fit_betas(scaled[(losses >= low) & (losses <= high)]).of_large(scaled)
