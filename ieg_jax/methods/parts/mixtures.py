"""Two-component mixtures on the losses of all training examples: whose labels are wrong, those of large losses.

They are fitted on the host at the end of an epoch, by expectation and maximisation.
"""

import numpy as np

EDGE = 1e-4  # losses are brought into [EDGE, 1 − EDGE], where a beta distribution has a density
STEPS = 200


def normalised(losses: np.ndarray) -> np.ndarray:
    """Losses `[N]` brought to (0, 1): outliers cut off (the 5 % least and largest), then scaled linearly.

    As in the published code of Arazo et al. (2019).
    """
    low, high = np.percentile(losses, (5, 95))
    scaled = (np.clip(losses, low, high) - low) / max(high - low, 1e-12)
    return np.clip(scaled, EDGE, 1 - EDGE)


def beta_mixture(losses: np.ndarray) -> np.ndarray:
    """P(large-loss component | loss) of a mixture of two beta distributions: `[N]` in (0, 1) -> `[N]`.

    Arazo et al. (2019), section 3.1: the expectation step is Bayes' rule, the maximisation step the weighted method of
    moments; a posterior never falls below that of the largest loss at the left, as a wide component would have it.

    Args:
      losses: from `normalised`.
    """
    from scipy.stats import beta  # takes a second, and all that reads flags comes by here

    shapes, posterior = np.empty((2, 2)), np.stack([1 - losses, losses])  # each loss at first as large as it is
    for _ in range(STEPS):
        for number, weights in enumerate(posterior):
            mean = np.average(losses, weights=weights)
            variance = max(np.average((losses - mean) ** 2, weights=weights), 1e-6)
            factor = max(mean * (1 - mean) / variance - 1, 1e-2)
            shapes[number] = mean * factor, (1 - mean) * factor
        shares, before = posterior.mean(1), posterior
        weighted = np.stack([share * beta.pdf(losses, *shape) for share, shape in zip(shares, shapes, strict=True)])
        posterior = np.maximum(weighted, 1e-12)
        posterior = posterior / posterior.sum(0)
        if np.abs(posterior - before).max() < 1e-4:
            break
    large = int(np.argmax(shapes[:, 0] / shapes.sum(1)))
    found = posterior[large]
    # Between the two means it rises with the loss; beyond them it stays where it was.
    order = np.argsort(losses, kind="stable")
    centre = np.searchsorted(losses[order], np.sort(shapes[:, 0] / shapes.sum(1)))
    along = found[order]
    along[: centre[0]] = np.minimum(along[: centre[0]], along[min(centre[0], len(along) - 1)])
    along[centre[1] :] = np.maximum(along[centre[1] :], along[min(centre[1], len(along) - 1)])
    found[order] = along
    return np.clip(found, EDGE, 1 - EDGE)
