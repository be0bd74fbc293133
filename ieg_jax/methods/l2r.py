"""L2R: learning to reweight examples (Ren et al. 2018), with a step ahead of plain gradient descent.

IEG's reweighting alone: ω⁰ = 0, so that the lookahead takes a step on the weight decay only, no momentum in it,
no λ, no pseudo labels, and Σ_i ω*_i CE(y_i, Φ(x_i)) on the given labels as the loss.
"""

import jax
import jax.numpy as jnp

from ieg_jax import losses, meta
from ieg_jax.methods.base import Aux, Context, Supervision, total, trusted_loss

NEEDS = frozenset({"probe"})
TRAINS_ON = "noisy"


def supervise(context: Context, state, batch, rng) -> Supervision:
    """Example weights ω* from the trusted loss one step ahead (paper, equation 2)."""
    del rng
    label = context.one_hot(batch["label"])

    def noisy_loss(params, weights):
        logits, _ = context.forward(params, state.batch_stats, batch["image"])
        return jnp.sum(weights * losses.cross_entropy(logits, label)) + context.weight_decay(params)

    probe_loss_after, gradient = meta.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(context, params, state, batch),
        jnp.zeros(label.shape[0], label.dtype),
        state.params,
        context.optimizer.init(state.params),
        context.optimizer,
        context.config.meta.learning_rate,
        context.config.meta.layers,
    )
    return Supervision(example_weights=meta.example_weights(gradient), probe_loss=probe_loss_after)


def loss(context: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ_i ω*_i CE(y_i, Φ(x_i)) + weight decay."""
    del rng
    logits, batch_stats = context.forward(params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, context.one_hot(batch["label"]))
    terms = {
        "weighted": jnp.sum(supervision.example_weights * cross_entropy),
        "weight_decay": context.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
