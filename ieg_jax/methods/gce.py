"""GCE: generalised cross-entropy (Zhang and Sabuncu 2018, arXiv 1805.07836).

    L_q = (1 − Φ_y(x)^q) / q

with Φ_y(x) the probability of the given label. For q → 0 it is the cross-entropy, for q = 1 the mean absolute error,
whose gradient does not grow without bound for labels that the network takes to be wrong.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, number
from ieg_jax.methods.base import Aux, Context, Supervision, total

TITLE = "GCE"
KEYS = {"q": Key(0.7, number(lambda v: 0 < v <= 1, "in (0, 1]"), "q: towards 0 cross-entropy, 1 = absolute error.")}


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean L_q over the batch + weight decay."""
    del supervision, rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    q = ctx.config.method.q
    log_probability = jnp.sum(ctx.one_hot(batch["label"]) * jax.nn.log_softmax(logits), -1)
    terms = {
        "generalized_cross_entropy": jnp.mean((1 - jnp.exp(q * log_probability)) / q),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
