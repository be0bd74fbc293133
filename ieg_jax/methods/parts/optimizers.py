"""The optimiser: an optax direction, applied with a learning rate that is given at each step.

optax is the JAX ecosystem's library of optimisers. The direction and the learning rate are kept apart because
the same update is made twice in a step, really with the scheduled rate and virtually with `meta.learning_rate`.

Weights decay once, by the key `optimizer.weight_decay`: as a term of every loss (`sgd`, `adam`), or in the direction
(`adamw`), and then no loss has the term.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, boolean, one_of, within
from ieg_jax.methods.parts import losses

NAMES = ("sgd", "adam", "adamw")
EPS_ROOT = 1e-12  # keeps Adam's square root differentiable where a gradient is 0


def validate(optimizer: ConfigDict) -> None:
    """Raises UserError for a value in the group `optimizer` of the configuration that is not allowed."""
    checks = {
        "name": one_of(*NAMES),
        "momentum": within(0, 1, open_end=True),
        "nesterov": boolean,
        "weight_decay": at_least(0),
        "weight_decay_on": one_of("all", "kernels"),
    }
    config_lib.check_values(optimizer, checks, "optimizer.")


def create(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Builds the direction that `config.optimizer` names, to be followed downhill by `apply`.

    `sgd`: the momentum m ← μ m + ∇ (or ∇ + μ m with nesterov). `adam`: the bias-corrected quotient of moments.
    `adamw`: that quotient + weight_decay · Θ, so that a weight shrinks by the same share whatever its gradients
    (Loshchilov and Hutter 2019). The decay does not depend on ∇, so the meta-gradient goes through the quotient alone.
    """
    if optimizer.name == "sgd":
        return optax.trace(decay=optimizer.momentum, nesterov=optimizer.nesterov)
    adam = _differentiable(optax.scale_by_adam(b1=optimizer.momentum, eps_root=EPS_ROOT, nesterov=optimizer.nesterov))
    if optimizer.name == "adam":
        return adam
    decays = functools.partial(losses.decayed, on=optimizer.weight_decay_on)
    return optax.chain(adam, optax.add_decayed_weights(optimizer.weight_decay, mask=decays))


def _differentiable(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a derivative by ∇ that means something where its moments are new.

    There the quotient of the moments is ∇ / √∇², a sign, whose derivative is 0, and with it all ω would be. So at the
    first step, and always where the lookahead begins without moments (`meta.momentum=False`, `l2r`), the denominator
    counts as a constant: the derivative is direction / ∇. The direction is optax's.
    """

    def update(grads, state, params=None):
        direction, new = adam.update(grads, state, params)

        def at_first(gradient, exact):
            now, value = jax.lax.stop_gradient((gradient, exact))
            slope = jnp.where(now == 0, 1 / EPS_ROOT**0.5, value / jnp.where(now == 0, 1, now))
            return jnp.where(state.count == 0, value + slope * (gradient - now), exact)

        return jax.tree.map(at_first, grads, direction), new

    return optax.GradientTransformation(adam.init, update)


def decay_in_loss(optimizer: ConfigDict) -> float:
    """The coefficient of the weight decay term of every loss: 0 where the direction has the decay."""
    return 0.0 if optimizer.name == "adamw" else optimizer.weight_decay


def apply(optimizer: optax.GradientTransformation, grads, state, params, learning_rate):
    """One update Θ ← Θ − learning_rate · direction(∇, state, Θ).

    Args:
      optimizer: the direction.
      grads: ∇.
      state: of the optimiser.
      params: Θ.
      learning_rate: a scalar, or one for each parameter in a tree like Θ.

    Returns:
      New parameters, new optimiser state, and the update that was added to the parameters.
    """
    direction, state = optimizer.update(grads, state, params)
    if jax.tree.structure(learning_rate) == jax.tree.structure(params):
        updates = jax.tree.map(lambda d, rate: -rate * d, direction, learning_rate)
    else:
        updates = jax.tree.map(lambda d: -learning_rate * d, direction)
    return optax.apply_updates(params, updates), state, updates
