"""The optimiser: an optax direction, applied with a learning rate that is given at each step.

optax is the JAX ecosystem's library of optimisers. The direction and the learning rate are kept apart because
the same update is made twice in a step, really with the scheduled rate and virtually with `meta.learning_rate`.
"""

import jax
import optax
from ml_collections import ConfigDict

NAMES = ("sgd", "adam")


def create(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Builds the direction that `config.optimizer` names, to be followed downhill by `apply`.

    `sgd`: the momentum m ← μ m + ∇ (or ∇ + μ m with nesterov). `adam`: the bias-corrected quotient of moments.
    Weight decay is part of the loss, not of the optimiser.
    """
    if optimizer.name == "adam":
        # eps_root keeps the square root differentiable where a gradient is 0.
        return optax.scale_by_adam(b1=optimizer.momentum, eps_root=1e-12, nesterov=optimizer.nesterov)
    return optax.trace(decay=optimizer.momentum, nesterov=optimizer.nesterov)


def apply(optimizer: optax.GradientTransformation, grads, state, params, learning_rate):
    """One update Θ ← Θ − learning_rate · direction(∇, state).

    Returns:
      New parameters, new optimiser state, and the update that was added to the parameters.
    """
    direction, state = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda d: -learning_rate * d, direction)
    return optax.apply_updates(params, updates), state, updates
