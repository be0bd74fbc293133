"""ELR: early-learning regularisation (Liu et al. 2020, arXiv 2007.00151).

A network fits the right labels first. ELR remembers what it predicted for each example, as a moving average t, and
keeps it from forgetting that when it begins to memorise the wrong labels:

    t_i ← β t_i + (1 − β) p_i,   p = softmax(Φ(x)) cut to [10⁻⁴, 1 − 10⁻⁴], in t divided by its sum
    L = CE(y, Φ(x)) + λ mean_i log(1 − ⟨p_i, t_i⟩) + weight decay

The logarithm falls without bound as p agrees with t, so that its gradient grows where the two are close: it makes up
for that of the cross-entropy, which vanishes for right labels, and turns that of wrong labels around.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, at_least, within
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses

TITLE = "ELR"
KEYS = {
    "target_momentum": Key(0.7, within(0, 1, open_end=True), "β, the share of the old value that a target keeps."),
    "early_learning_weight": Key(3.0, at_least(0), "λ, of the regularisation."),
}
SMALLEST = 1e-4


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The targets t of all examples, 0 at first: `[num_rows, K]`."""
    del rng
    return {"target": jnp.zeros((num_rows, ctx.num_classes))}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The targets t of the batch after this step's predictions, `[B, K]`."""
    del rng
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    p, beta = probabilities(logits), ctx.config.method.target_momentum
    old = state.method["target"]
    target = beta * old[batch["row"]] + (1 - beta) * p / jnp.sum(p, -1, keepdims=True)
    return Supervision(prepared=target, memory={"target": ctx.write_rows(old, batch["row"], target)})


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE + λ mean log(1 − ⟨p, t⟩) + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    agreement = jnp.sum(probabilities(logits) * supervision.prepared, -1)
    terms = {
        "cross_entropy": jnp.mean(losses.cross_entropy(logits, ctx.one_hot(batch["label"]))),
        "early_learning": ctx.config.method.early_learning_weight * jnp.mean(jnp.log(1 - agreement)),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)


def probabilities(logits: jax.Array) -> jax.Array:
    """Softmax, cut to [10⁻⁴, 1 − 10⁻⁴] so that the logarithm of the loss has a bound."""
    return jnp.clip(jax.nn.softmax(logits), SMALLEST, 1 - SMALLEST)
