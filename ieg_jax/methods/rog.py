"""RoG: robust inference by a generative classifier on features (Lee et al. 2019, arXiv 1901.11300).

The network learns the given labels by cross-entropy, as `supervised`. What predicts is not its head: before each
evaluation normal distributions with a mean for each class and one covariance for all, Σ, are fitted to the features f
of the training examples and their given labels, by the minimum covariance determinant, so that wrong labels, whose
features lie far from the others of the class, do not count:

    S_c = the share `support` of the examples of class c, at first drawn at random
    μ_c = mean of f over S_c,  Σ = Σ_c N_c cov(f over S_c) / N
    S_c ← those of class c with the smallest (f − μ_c)ᵀ Σ⁻¹ (f − μ_c);   `c_steps` times, and μ, Σ anew
    p(c | x) ∝ exp(μ_cᵀ Σ⁻¹ f(x) − ½ μ_cᵀ Σ⁻¹ μ_c)

As published, `support` is 0.7, there is one step, the distances in each class are by the common Σ (which is known well
where a class has fewer examples than features), and all classes count as equally likely. With `support=1` it is
linear discriminant analysis. The published numbers are of a weighted sum of such classifiers after each block of the
network, with weights learned on noisy validation examples; here it is the last one alone, which needs no such examples.
The published code divides the covariance of the first draw anew at each turn of its loop over the classes, so that the
last class decides the distances; here each has its part.

The averaged and the raw weights each have their own fit, so an evaluation costs two passes over the training set.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ieg_jax.config import Key, at_least, number
from ieg_jax.methods.base import Context, mean_of_networks
from ieg_jax.methods.parts import losses
from ieg_jax.methods.supervised import loss as loss  # that of plain training

TITLE = "RoG"
KEYS = {
    "support": Key(
        0.7, number(lambda v: 0 < v <= 1, "in (0, 1]"), "Share of the examples of a class that the fit is to."
    ),
    "c_steps": Key(1, at_least(0), "How often these are chosen anew, by their distance; 0 = they stay a random draw."),
}


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The classifier of features, `[K, D]` and `[K]`; and whether it was fitted."""
    del rng, num_rows
    return {
        "kernel": jnp.zeros((ctx.num_classes, ctx.num_features)),
        "bias": jnp.zeros(ctx.num_classes),
        "fitted": jnp.zeros((), jnp.int32),
    }


def fit(ctx: Context, look) -> dict[str, np.ndarray]:
    """The classifier for the weights that are evaluated."""
    method = ctx.config.method
    means, covariance = gaussians(
        look.features()[0], look.labels, ctx.num_classes, method.support, method.c_steps, look.seed
    )
    kernel, bias = discriminant(means, covariance)
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32), "fitted": np.int32(1)}


def gaussians(
    features: np.ndarray, labels: np.ndarray, num_classes: int, support: float, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """μ and Σ, robustly.

    Args:
      features: `[N, D]`.
      labels: `[N]`.
      num_classes: K.
      support: share of a class that counts.
      steps: how often it is chosen anew.
      seed: of the first draw.

    Returns:
      `[K, D]`, nan for a class without examples, and `[D, D]`; float64.
    """
    rng, features = np.random.default_rng(seed), np.asarray(features, np.float64)
    members = {c: rows for c in range(num_classes) if len(rows := np.flatnonzero(labels == c))}
    counts = {c: max(1, int(support * len(rows))) for c, rows in members.items()}
    chosen = {c: rng.permutation(rows)[: counts[c]] for c, rows in members.items()}

    def estimate():
        means, covariance = np.full((num_classes, features.shape[1]), np.nan), 0.0
        for c, rows in chosen.items():
            means[c] = features[rows].mean(0)
            centred = features[rows] - means[c]
            covariance = covariance + len(members[c]) / len(features) * centred.T @ centred / len(rows)
        return means, covariance

    for _ in range(steps):
        means, covariance = estimate()
        precision = scipy.linalg.pinvh(covariance)
        for c, rows in members.items():
            centred = features[rows] - means[c]
            distance = np.einsum("nd,nd->n", centred @ precision, centred)
            chosen[c] = rows[np.argsort(distance, kind="stable")[: counts[c]]]
    return estimate()


def discriminant(means: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ⁻¹ μ_c `[K, D]` and −½ μ_cᵀ Σ⁻¹ μ_c `[K]`; a class without a mean has no chance."""
    missing = np.isnan(means[:, 0])
    known = np.where(missing[:, None], 0.0, means)
    kernel = known @ scipy.linalg.pinvh(covariance)
    return kernel, np.where(missing, losses.NEVER, -0.5 * np.sum(kernel * known, 1))


def predict(ctx: Context, variables: Mapping[str, Any], memory: Any, images: jax.Array) -> jax.Array:
    """By the generative classifier: images `[n, H, W, C]` -> `[n, K]`; by the head where nothing was fitted yet."""
    logits = ctx.features(variables, images)[0] @ memory["kernel"].T + memory["bias"]
    by_head = mean_of_networks(ctx, variables, memory, images)
    return jnp.where(memory["fitted"] > 0, jax.nn.softmax(logits), by_head)
