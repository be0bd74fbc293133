"""Losses, one value per example: `[B]` float32 from logits `[B, K]`."""

import jax
import jax.numpy as jnp

NEVER = -1e4  # in place of log 0: what T excludes costs so much, and has a gradient


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of soft targets: −Σ_j target_j log softmax(logits)_j.

    Args:
      logits: `[B, K]`.
      target: `[B, K]`, rows that sum to 1.

    Returns:
      `[B]`, in nats.
    """
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def squared_error(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of the probabilities, mean over the classes: (1/K) Σ_j (target_j − softmax(logits)_j)².

    Bounded where the cross-entropy is not, so that wrong targets pull less (Berthelot et al. 2019, equation 4).

    Args:
      logits: `[B, K]`.
      target: `[B, K]`, rows that sum to 1.

    Returns:
      `[B]`.
    """
    return jnp.mean(jnp.square(target - jax.nn.softmax(logits)), axis=-1)


def corrected(logits: jax.Array, label: jax.Array, transition: jax.Array) -> jax.Array:
    """Cross-entropy of what the labels would be after the noise: −log Σ_k Φ_k T_{k y}, `[B]` (Patrini et al. 2017).

    Args:
      logits: `[B, K]`.
      label: `[B, K]`, one-hot.
      transition: `[K, K]`, rows that sum to 1.
    """
    # In logarithms, so that it is the cross-entropy where T is the identity, whatever the logits.
    chance = label @ transition.T
    towards = jnp.where(chance > 0, jnp.log(jnp.where(chance > 0, chance, 1)), NEVER)
    return -jax.nn.logsumexp(jax.nn.log_softmax(logits) + towards, axis=-1)


def consistency(logits: jax.Array, view_logits: jax.Array) -> jax.Array:
    """KL(softmax(logits) ‖ softmax(view_logits)), no gradient through the first argument (paper, equation 7).

    Args:
      logits: `[B, K]`, of the standard view.
      view_logits: `[B, K]`, of a strong view.

    Returns:
      `[B]`, in nats.
    """
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
    return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(view_logits)), axis=-1)


def weight_decay(params, coefficient: float, on: str) -> jax.Array:
    """`coefficient` · ½‖Θ‖², a scalar.

    Args:
      params: nested dict of parameters.
      coefficient: at least 0.
      on: `all` parameters, or `kernels`: those of convolutions and dense layers, without biases and batch norm.
    """
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(decayed(params, on)), strict=True)
    return 0.5 * coefficient * sum(jnp.sum(jnp.square(leaf)) for leaf, decays in leaves if decays)


def decayed(params, on: str):
    """Which parameters decay: booleans in the structure of `params`; `on` as in `weight_decay`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: on == "all" or path[-1].key == "kernel", params)
