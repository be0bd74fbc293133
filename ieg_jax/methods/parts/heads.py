"""Small networks of a method's own, on the features of the network and trained beside it.

Their weights are no parameters of the run: the method remembers them, with the state of their optimiser, and nothing is
predicted with them. A step moves them as it moves the network: by the optimiser of the run, at its rate, along the
gradient of the loss at the weights before the step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ieg_jax.methods.base import Context
from ieg_jax.methods.parts import optimizers


class Heads(NamedTuple):
    """What is remembered."""

    weights: Any
    optimizer: Any


def dense(ctx: Context, rng: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """The initial weights of a dense layer, as Flax draws them: `kernel [inputs, outputs]`, `bias [outputs]`."""
    kernel = jax.nn.initializers.lecun_normal()(rng, (inputs, outputs), ctx.float_type)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, ctx.float_type)}


def begin(ctx: Context, weights: Any) -> Heads:
    """The heads before the first step."""
    return Heads(weights, ctx.optimizer.init(weights))


def moved(ctx: Context, heads: Heads, loss: Callable[[Any], jax.Array], step: jax.Array) -> Heads:
    """The heads after a step on a loss and, like the network, on its weight decay.

    Args:
      ctx: of the run.
      heads: before the step.
      loss: weights -> scalar.
      step: updates made so far.
    """
    gradient = jax.grad(lambda weights: loss(weights) + ctx.weight_decay(weights))(heads.weights)
    rate = ctx.schedule(step)
    weights, optimizer, _ = optimizers.apply(ctx.optimizer, gradient, heads.optimizer, heads.weights, rate)
    return Heads(weights, optimizer)
