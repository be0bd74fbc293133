"""Plain cross-entropy on the labels as given: what label noise does to a network that trusts it."""

import jax
import jax.numpy as jnp

from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses

TITLE = "supervised"


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE(y, Φ(x)) over the batch + weight decay."""
    del supervision, rng
    return cross_entropy_loss(ctx, params, state, batch["image"], batch["label"])


def cross_entropy_loss(ctx: Context, params, state, image, label) -> tuple[jax.Array, Aux]:
    """Mean CE(label, Φ(image)) + weight decay."""
    logits, batch_stats = ctx.forward(params, state.batch_stats, image)
    terms = {
        "cross_entropy": jnp.mean(losses.cross_entropy(logits, ctx.one_hot(label))),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
