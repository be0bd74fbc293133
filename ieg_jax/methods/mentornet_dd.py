"""MentorNet, data-driven (Jiang et al. 2018, arXiv 1712.05055): which labels to trust is learned from trusted ones.

V sees of an example its loss, how much that is above λ₁ (the moving percentile of `mentornet`), an embedding of its
given label and the share t of the first `burn_in_epochs` that is over, 1 from there on, and says how likely the label
is right:

    v_i = sigmoid(V(CE_i, CE_i − λ₁, e(y_i), t; ψ)),   V: 3 + `LABEL_UNITS` → `mentor_units` → 1, tanh inside
    ψ ← Adam step on −(1 − s) log v(y_p) − s log(1 − v(y′_p)), the mean over trusted images with their labels y_p
    L = Σ_i v_i CE_i / Σ_i v_i + weight decay, with the new ψ and no gradient through v; for the burn-in v = 1

A trusted image is not learned from. It shows V what a right label and what a wrong one look like: y′_p is drawn anew at
each step, another class than y_p, and s (`wrong_share`) is how often labels are wrong. The published V learns
beforehand or now and then, from the training examples of a trusted subset, whose own wrong labels are its negative
examples; so it knows the losses of memorised ones, which trusted images cannot have here. Its inner layer is an LSTM
that sees one step; its input t stays what it is at the end of the burn-in, as here, and its label is the same for all.
There weights of a batch are at first dropped at random, and not divided by their sum. `mentor_rate` is 0.1 there,
falling over 30,000 steps.
"""

import jax
import jax.numpy as jnp
import optax

from ieg_jax.config import Key, above, at_least, within
from ieg_jax.methods import mentornet
from ieg_jax.methods.base import MAIN, PROBE, Context, Stream, Supervision
from ieg_jax.methods.mentornet import loss as loss  # Σ v CE / Σ v
from ieg_jax.methods.parts import losses

TITLE = "MentorNet DD"
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = {
    **{name: mentornet.KEYS[name] for name in ("loss_percentile", "pace_decay", "burn_in_epochs")},
    "mentor_units": Key(20, at_least(1), "Units of the hidden layer of V."),
    "mentor_rate": Key(0.01, above(0), "Learning rate of V (Adam)."),
    "wrong_share": Key(0.5, within(0, 1), "s, how often the labels that V will see are wrong."),
}
LABEL_UNITS = 2


def passes(config) -> float:
    """Forward and backward over the noisy images, forward over the trusted ones."""
    return 3 + (config.trusted.batch_size or config.batch_size) / config.batch_size


def init(ctx: Context, rng, num_rows: int) -> dict:
    """λ₁, 0 before the first step; ψ and the moments of its Adam."""
    del num_rows
    units, glorot = ctx.config.method.mentor_units, jax.nn.initializers.glorot_uniform()
    first, second, third = jax.random.split(rng, 3)
    psi = {
        "embedding": glorot(first, (ctx.num_classes, LABEL_UNITS)),
        "hidden": {"kernel": glorot(second, (3 + LABEL_UNITS, units)), "bias": jnp.zeros(units)},
        "out": {"kernel": glorot(third, (units, 1)), "bias": jnp.zeros(1)},
    }
    return {"pace": jnp.zeros(()), "psi": psi, "adam": optax.scale_by_adam().init(psi)}


def judge(psi, cross_entropy: jax.Array, pace: jax.Array, label: jax.Array, progress: jax.Array) -> jax.Array:
    """V before its sigmoid: losses and labels `[B]` -> `[B]`."""
    seen = jnp.stack([cross_entropy, cross_entropy - pace, jnp.full_like(cross_entropy, progress)], -1)
    hidden = jnp.concatenate([seen, psi["embedding"][label]], -1)
    hidden = jnp.tanh(hidden @ psi["hidden"]["kernel"] + psi["hidden"]["bias"])
    return (hidden @ psi["out"]["kernel"] + psi["out"]["bias"])[:, 0]


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """A step of ψ, and the weights that it gives."""
    method, memory = ctx.config.method, state.method
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    pace = mentornet.moving_percentile(method, memory["pace"], cross_entropy)
    burn_in = method.burn_in_epochs * ctx.steps_per_epoch
    progress = jnp.minimum(state.step / max(burn_in, 1), 1.0) if burn_in else jnp.ones(())

    trusted, _ = ctx.forward(state.params, state.batch_stats, batch["probe_image"])
    right = batch["probe_label"]
    wrong = (right + jax.random.randint(rng, right.shape, 1, ctx.num_classes)) % ctx.num_classes

    def mentor_loss(psi):
        of_right, of_wrong = (
            judge(psi, losses.cross_entropy(trusted, ctx.one_hot(label)), pace, label, progress)
            for label in (right, wrong)
        )
        share = method.wrong_share
        return jnp.mean((1 - share) * jax.nn.softplus(-of_right) + share * jax.nn.softplus(of_wrong))

    value, gradient = jax.value_and_grad(mentor_loss)(memory["psi"])
    direction, moments = optax.scale_by_adam().update(gradient, memory["adam"])
    psi = jax.tree.map(lambda p, d: p - method.mentor_rate * d, memory["psi"], direction)
    weights = jax.nn.sigmoid(judge(psi, cross_entropy, pace, batch["label"], progress))
    weights = jnp.where(state.step < burn_in, jnp.ones_like(weights), weights)
    return Supervision(
        example_weights=weights / jnp.maximum(jnp.sum(weights), 1e-12),
        memory={"pace": pace, "psi": psi, "adam": moments},
        observed={"loss/mentor": value, "train/pace": pace, "weight/mean": jnp.mean(weights)},
    )
