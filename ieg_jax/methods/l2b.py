"""L2B: learning to bootstrap (Zhou et al. 2024, arXiv 2202.04291): weights for given *and* pseudo labels.

As in L2R (`l2r`) the weights are those that help the trusted set one step ahead, and each example has two: α of its
given label and β of ŷ, the class that the network predicts. So a wrong label is not only left out, its example may be
learned under another one, and no sum α + β is prescribed:

    Θ′(α, β) = Θ − η ∇ Σ_i (α_i CE(y_i, Φ(x_i)) + β_i CE(ŷ_i, Φ(x_i)))   at α = β = 0
    α* = max(−∂L_p/∂α, 0) / Z,   β* = max(−∂L_p/∂β, 0) / Z,   Z = Σ_i (α_i* + β_i*)
    L = Σ_i (α_i* CE(y_i) + β_i* CE(ŷ_i)) + weight decay

The pseudo label is that of this step's standard view, and no gradient flows through it. The published code trains one
epoch by cross-entropy first, its lookahead is the step of the run, momentum and scheduled rate included, and its
trusted loss is without weight decay, as here with `meta.weight_decay=False`.
"""

import jax
import jax.numpy as jnp
import optax

from ieg_jax.methods.base import MAIN, PROBE, Aux, Context, Stream, Supervision, total, trusted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "L2B"
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = lookahead.KEYS


def passes(config) -> float:
    """As L2R: the pseudo labels come from a forward pass that is there already."""
    return 7 + 3 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """α*, β* and the pseudo labels."""
    del rng
    label = ctx.one_hot(batch["label"])
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    pseudo = ctx.one_hot(jnp.argmax(jax.lax.stop_gradient(logits), -1))

    def noisy_loss(params, weights):
        logits, _ = ctx.forward(params, state.batch_stats, batch["image"])
        each = [losses.cross_entropy(logits, target) for target in (label, pseudo)]
        return sum(jnp.sum(w * ce) for w, ce in zip(weights, each, strict=True)) + ctx.weight_decay(params)

    nothing = jnp.zeros(label.shape[0], label.dtype)
    trusted_loss_after, gradients = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, batch),
        (nothing, nothing),
        state.params,
        optax.EmptyState(),
        optax.identity(),
        ctx.config.meta.learning_rate,
        ctx.config.meta.layers,
    )
    # Both divided by one sum.
    weights = jnp.split(lookahead.example_weights(jnp.concatenate(gradients)), 2)
    return Supervision(
        pseudo_label=pseudo,
        example_weights=weights[0],
        prepared=weights[1],
        observed={"loss/trusted_after_lookahead": trusted_loss_after, "weight/pseudo": jnp.sum(weights[1])},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ α* CE(y) + Σ β* CE(ŷ) + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    given = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    pseudo = losses.cross_entropy(logits, supervision.pseudo_label)
    terms = {
        "weighted": jnp.sum(supervision.example_weights * given),
        "bootstrapped": jnp.sum(supervision.prepared * pseudo),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
