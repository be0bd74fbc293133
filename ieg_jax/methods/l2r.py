"""L2R: learning to reweight examples (Ren et al. 2018), with a step ahead of plain gradient descent.

IEG's reweighting alone: ω⁰ = 0, so that the lookahead takes a step on the weight decay only, by plain gradient descent
whatever the optimiser of the run, no λ, no pseudo labels, and Σ_i ω*_i CE(y_i, Φ(x_i)) on the given labels as the loss.
"""

import jax
import jax.numpy as jnp
import optax

from ieg_jax.methods.base import PROBE, Aux, Context, Stream, Supervision, trusted_loss, weighted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "L2R"
KEYS = lookahead.KEYS
STREAMS = {"main": Stream(), **PROBE}


def passes(config) -> float:
    """7 + 3 r for r trusted images to each noisy one: lookahead 3, trusted loss 3 r, derivative along it 2, loss 2."""
    return 7 + 3 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Example weights ω* from the trusted loss one step ahead (paper, equation 2)."""
    del rng
    label = ctx.one_hot(batch["label"])

    def noisy_loss(params, weights):
        logits, _ = ctx.forward(params, state.batch_stats, batch["image"])
        return jnp.sum(weights * losses.cross_entropy(logits, label)) + ctx.weight_decay(params)

    trusted_loss_after, gradient = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, batch),
        jnp.zeros(label.shape[0], label.dtype),
        state.params,
        optax.EmptyState(),
        optax.identity(),
        ctx.config.meta.learning_rate,
        ctx.config.meta.layers,
    )
    return Supervision(
        example_weights=lookahead.example_weights(gradient),
        observed={"loss/trusted_after_lookahead": trusted_loss_after},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ_i ω*_i CE(y_i, Φ(x_i)) + weight decay."""
    del rng
    return weighted_loss(ctx, params, state, batch, supervision.example_weights)
