"""MentorNet with a predefined curriculum (Jiang et al. 2018, arXiv 1712.05055): self-paced learning of small losses.

The predefined MentorNet computes the weights of linear self-paced learning (λ₂ ≠ 0), so these are
used as they are:

    v_i = min(max(1 − (CE_i − λ₁) / λ₂, 0), 1),   L = Σ_i v_i CE_i / Σ_i v_i + weight decay

λ₁ is a moving average of the `loss_percentile` of the losses of a batch, as in the published code, λ₂ is
`pace_width` · λ₁. For the first `burn_in_epochs` every weight is 1. `mentornet_dd` learns a curriculum from trusted
labels.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above, at_least, within
from ieg_jax.methods.base import Aux, Context, Supervision, weighted_loss
from ieg_jax.methods.parts import losses

TITLE = "MentorNet PD"
KEYS = {
    "loss_percentile": Key(0.75, within(0, 1), "Share of a batch whose losses count as small: of right labels."),
    "pace_decay": Key(0.95, within(0, 1, open_end=True), "What λ₁ keeps of its old value at each step."),
    "pace_width": Key(0.5, above(0), "λ₂ / λ₁: over how much the weights fall from 1 to 0."),
    "burn_in_epochs": Key(2.0, at_least(0), "Epochs in which all examples count alike."),
}


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """λ₁, 0 before the first step."""
    del ctx, rng, num_rows
    return {"pace": jnp.zeros(())}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The weights v, divided by their sum."""
    del rng
    method = ctx.config.method
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    pace = moving_percentile(method, state.method["pace"], cross_entropy)
    weights = jnp.clip(1 - (cross_entropy - pace) / (method.pace_width * pace + 1e-12), 0, 1)
    weights = jnp.where(state.step < method.burn_in_epochs * ctx.steps_per_epoch, 1.0, weights)
    # The smallest loss always counts: of a batch of large ones nothing would be left.
    weights = jnp.where(jnp.sum(weights) > 0, weights, cross_entropy == jnp.min(cross_entropy))
    return Supervision(example_weights=weights / jnp.sum(weights), memory={"pace": pace}, observed={"train/pace": pace})


def moving_percentile(method, old: jax.Array, cross_entropy: jax.Array) -> jax.Array:
    """λ₁ after a batch of losses `[B]`, from its `old` value, 0 = none yet; `method` is that group of keys."""
    now = jnp.quantile(cross_entropy, method.loss_percentile)
    return jnp.where(old == 0, now, method.pace_decay * old + (1 - method.pace_decay) * now)


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ v CE / Σ v + weight decay."""
    del rng
    return weighted_loss(ctx, params, state, batch, supervision.example_weights)
