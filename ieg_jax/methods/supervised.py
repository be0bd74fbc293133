"""Plain cross-entropy on the labels as given: what label noise does to a network that trusts it."""

import jax
import jax.numpy as jnp

from ieg_jax import losses
from ieg_jax.methods.base import Aux, Context, Supervision, total

NEEDS = frozenset()
TRAINS_ON = "noisy"


def supervise(context: Context, state, batch, rng) -> Supervision:
    """Nothing: the labels are the supervision."""
    del context, state, batch, rng
    return Supervision()


def loss(context: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE(y, Φ(x)) over the batch + weight decay."""
    del supervision, rng
    return cross_entropy_loss(context, params, state, batch["image"], batch["label"])


def cross_entropy_loss(context: Context, params, state, image, label) -> tuple[jax.Array, Aux]:
    """Mean CE(label, Φ(image)) + weight decay."""
    logits, batch_stats = context.forward(params, state.batch_stats, image)
    terms = {
        "cross_entropy": jnp.mean(losses.cross_entropy(logits, context.one_hot(label))),
        "weight_decay": context.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
