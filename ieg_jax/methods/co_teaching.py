"""Co-teaching (Han et al. 2018, arXiv 1804.06872): two networks that choose for each other what to learn from.

In each batch each network takes the examples whose loss is small, which are those with right labels while nothing is
memorised yet, and the other one learns from these alone. As the two make different mistakes, they do not confirm their
own. The share of the batch that is chosen falls in the first epochs:

    R(e) = 1 − τ min(e / E, 1),   L = Σ_r mean_{i chosen by the other} CE(y_i, Φ_r(x_i)) + weight decay

with e the epochs seen so far, τ `method.forget_rate`, best the share of wrong labels, and E `method.forget_epochs`.
The two networks start from different weights. Predictions are their mean.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above, within
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses

TITLE = "Co-teaching"
NETWORKS = 2
KEYS = {
    "forget_rate": Key(
        0.2, within(0, 1, open_end=True), "τ, the share of a batch that nobody learns from in the end: of wrong labels."
    ),
    "forget_epochs": Key(10.0, above(0), "E, epochs until that share is reached."),
}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Which examples each network learns from: 1 or 0, `[2, B]`."""
    del rng
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    method = ctx.config.method
    epochs = state.step / ctx.steps_per_epoch
    share = 1 - method.forget_rate * jnp.minimum(epochs / method.forget_epochs, 1)
    chosen = smallest(cross_entropy, share)
    # What the two networks together made of an example, for the metrics; it sums to 1 over the batch.
    weights = chosen.mean(0) / chosen.mean(0).sum()
    return Supervision(example_weights=weights, prepared=chosen[::-1], observed={"train/share_chosen": share})


def smallest(cross_entropy: jax.Array, share: jax.Array) -> jax.Array:
    """1 for the `share` of each row of losses `[R, B]` that is smallest, at least one, else 0."""
    rank = jnp.argsort(jnp.argsort(cross_entropy, -1), -1)
    return (rank < jnp.maximum(jnp.floor(share * rank.shape[-1]), 1)).astype(cross_entropy.dtype)


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """For each network the mean CE over the examples that were chosen for it (0 where none was) + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    chosen = supervision.prepared
    terms = {
        "cross_entropy": jnp.sum(jnp.sum(chosen * cross_entropy, -1) / jnp.maximum(jnp.sum(chosen, -1), 1)),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits.mean(0), batch_stats)
