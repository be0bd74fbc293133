"""Meta-Weight-Net (Shu et al. 2019, arXiv 1902.07379): a small network learns how to weigh examples by their loss.

    w_i = V(CE_i; ψ),   V: 1 → `weight_units` → 1, ReLU inside, a sigmoid at the end
    Θ′(ψ) = one optimiser update of Θ on Σ_i w_i CE_i / Σ_i w_i + weight decay
    ψ ← Adam step on ∂/∂ψ of the trusted loss at Θ′(ψ)
    L = Σ_i w_i CE_i / Σ_i w_i + weight decay   with the new ψ

V sees nothing but the loss, so that what it learns from the trusted examples holds for all others. Where V is constant
this is the cross-entropy. Of the published scripts one divides the weights by the size of the batch, at the lookahead
and at the step, the other (train_WRN-28-10_Meta_PGC.py), which is followed here, by their sum at both; else a part of
the gradient would go into a common factor, which the step divides by again. V has SGD in the latter and Adam in the
former, both at 10⁻³. Their trusted loss is without weight decay, as here with `meta.weight_decay=False`.
"""

import jax
import jax.numpy as jnp
import optax

from ieg_jax.config import Key, above, at_least
from ieg_jax.methods.base import MAIN, PROBE, Aux, Context, Stream, Supervision, trusted_loss, weighted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "Meta-Weight-Net"
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = {
    **lookahead.KEYS,
    "weight_units": Key(100, at_least(1), "Units of the hidden layer of V."),
    "weight_rate": Key(1e-3, above(0), "Learning rate of V (Adam)."),
}


def passes(config) -> float:
    """As L2R: the losses that V needs come from a forward pass that is there already."""
    return 7 + 3 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def init(ctx: Context, rng, num_rows: int) -> dict:
    """ψ and the moments of its Adam."""
    del num_rows
    units, (first, second) = ctx.config.method.weight_units, jax.random.split(rng)
    glorot = jax.nn.initializers.glorot_uniform()
    psi = {
        "hidden": {"kernel": glorot(first, (1, units)), "bias": jnp.zeros(units)},
        "out": {"kernel": glorot(second, (units, 1)), "bias": jnp.zeros(1)},
    }
    return {"psi": psi, "adam": optax.scale_by_adam().init(psi)}


def weigh(psi, cross_entropy: jax.Array) -> jax.Array:
    """V: `[B]` losses -> `[B]` weights in (0, 1)."""
    hidden = jax.nn.relu(cross_entropy[:, None] @ psi["hidden"]["kernel"] + psi["hidden"]["bias"])
    return jax.nn.sigmoid(hidden @ psi["out"]["kernel"] + psi["out"]["bias"])[:, 0]


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """A step of ψ, and the weights that it gives."""
    del rng
    label, psi = ctx.one_hot(batch["label"]), state.method["psi"]

    def noisy_loss(params, psi):
        logits, _ = ctx.forward(params, state.batch_stats, batch["image"])
        cross_entropy = losses.cross_entropy(logits, label)
        weights = weigh(psi, jax.lax.stop_gradient(cross_entropy))
        return jnp.sum(weights * cross_entropy) / jnp.sum(weights) + ctx.weight_decay(params)

    trusted_loss_after, gradient = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, batch),
        psi,
        state.params,
        state.opt_state,
        ctx.optimizer,
        ctx.config.meta.learning_rate,
        ctx.config.meta.layers,
    )
    direction, moments = optax.scale_by_adam().update(gradient, state.method["adam"])
    psi = jax.tree.map(lambda p, d: p - ctx.config.method.weight_rate * d, psi, direction)
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    weights = weigh(psi, losses.cross_entropy(logits, label))
    return Supervision(
        example_weights=weights / jnp.sum(weights),
        memory={"psi": psi, "adam": moments},
        observed={"loss/trusted_after_lookahead": trusted_loss_after, "weight/mean": jnp.mean(weights)},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ w CE / Σ w + weight decay."""
    del rng
    return weighted_loss(ctx, params, state, batch, supervision.example_weights)
