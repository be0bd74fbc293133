"""Pseudo labels: what the network, averaged over the views of an image, takes its class to be."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above, boolean

TEMPERATURE = Key(0.5, above(0), "τ, sharpens the pseudo labels.")
NORMALIZE_LOGITS = Key(True, boolean, "Divide logits by their root mean square in pseudo labels and mixup losses.")


def normalize_logits(logits: jax.Array, groups: int = 1) -> jax.Array:
    """Divides the logits of each group by the root of their mean square over the whole `[B/groups, K]` block.

    It keeps the confidence of pseudo labels from growing with the scale of the logits. In the authors' code,
    not in the paper.

    Args:
      logits: `[B, K]`.
      groups: equal, contiguous parts of the batch; must divide B.

    Returns:
      `[B, K]`.
    """
    blocks = logits.reshape(groups, -1, logits.shape[-1])
    mean_square = jnp.mean(jnp.square(blocks), axis=(1, 2), keepdims=True)
    return (blocks * jax.lax.rsqrt(mean_square + 1e-8)).reshape(logits.shape)


def pseudo_labels(view_logits: Sequence[jax.Array], temperature: float, normalize: bool, groups: int = 1) -> jax.Array:
    """G = P^{1/τ} / Σ_j P_j^{1/τ}, where P is the mean over the views of softmax(norm(logits)) (section 2.2.1).

    Args:
      view_logits: V arrays `[B, K]`.
      temperature: τ > 0; below 1 sharpens.
      normalize: whether norm is `normalize_logits` (authors) or the identity (paper).
      groups: of `normalize_logits`.

    Returns:
      `[B, K]`, rows that sum to 1. Gradients flow; stop them where g is a target.
    """
    if normalize:
        view_logits = [normalize_logits(logits, groups) for logits in view_logits]
    # In logarithms: P^{1/τ} of all classes is 0 in float32 where τ is small or K large, and G would be nan.
    log_sum = jax.nn.logsumexp(jnp.stack([jax.nn.log_softmax(logits) for logits in view_logits]), axis=0)
    return jax.nn.softmax(log_sum / temperature)
