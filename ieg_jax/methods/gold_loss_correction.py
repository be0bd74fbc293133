"""Gold loss correction, GLC (Hendrycks et al. 2018, arXiv 1802.05300): T from the trusted set, then both sets.

For E epochs the network learns the given labels. What it then says of trusted examples of class i is how labels of that
class are given:

    C_ij = mean over trusted x of class i of Φ_j(x)

From there on trusted examples are learned as they are, and noisy ones through C:

    L = (Σ_trusted CE(y, Φ(x)) + Σ_noisy −log Σ_k Φ_k(x) C_{k y}) / (B_p + B) + weight decay

C is the mean over the trusted images of the last of the E epochs, augmented as they are for training. The published
runs train a network of its own for C and begin again with another; here one network goes on. They shuffle the two sets
together, so that a trusted example is seen as often as a noisy one; here they are B_p of each B_p + B examples, which
`trusted.batch_size` decides.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above
from ieg_jax.methods.base import MAIN, PROBE, Aux, Context, Stream, Supervision, total
from ieg_jax.methods.parts import losses

TITLE = "GLC"
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = {"gold_epochs": Key(10.0, above(0), "E, epochs on the given labels before C is fixed.")}


def passes(config) -> float:
    """Forward and backward over both sets; C comes from a forward pass that is there already."""
    return 3 + 3 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The sums of the predictions for trusted examples by class `[K, K]`, and their numbers `[K]`."""
    del rng, num_rows
    return {"sum": jnp.zeros((ctx.num_classes, ctx.num_classes)), "count": jnp.zeros(ctx.num_classes)}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Adds what the network says of the trusted examples, in the last of the E epochs; C afterwards."""
    del rng
    epochs, end = state.step / ctx.steps_per_epoch, ctx.config.method.gold_epochs
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["probe_image"])
    label = ctx.one_hot(batch["probe_label"])
    counts = ((epochs >= jnp.maximum(end - 1, 0)) & (epochs < end)).astype(logits.dtype)
    memory = {
        "sum": state.method["sum"] + counts * label.T @ jax.nn.softmax(logits),
        "count": state.method["count"] + counts * label.sum(0),
    }
    begun = (epochs >= end).astype(logits.dtype)
    return Supervision(prepared=(matrix(memory), begun), memory=memory)


def matrix(memory) -> jax.Array:
    """C `[K, K]`; the row of a class of which nothing was seen is that of the identity."""
    count = memory["count"][:, None]
    return jnp.where(count > 0, memory["sum"] / jnp.maximum(count, 1), jnp.eye(len(count)))


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """At first the mean CE of the given labels; then that of both sets, the noisy one corrected; + weight decay."""
    del rng
    correction, begun = supervision.prepared
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    trusted, _ = ctx.forward(params, state.batch_stats, batch["probe_image"])
    label = ctx.one_hot(batch["label"])
    plain = losses.cross_entropy(logits, label)
    noisy = begun * losses.corrected(logits, label, correction) + (1 - begun) * plain
    gold = begun * losses.cross_entropy(trusted, ctx.one_hot(batch["probe_label"]))
    size = label.shape[0] + begun * gold.shape[0]
    terms = {
        "noisy": jnp.sum(noisy) / size,
        "trusted": jnp.sum(gold) / size,
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
