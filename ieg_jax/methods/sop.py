"""SOP: sparse over-parameterisation (Liu et al. 2022, arXiv 2202.14026).

Each example has two vectors of its own, which stand for what its label adds to the truth; only those of wrong labels
become large, for a network learns the right ones sooner than these grow:

    s_i = u_i² y_i − v_i² (1 − y_i),   q_i = (softmax(Φ(x_i)) + s_i)⁺ divided by its sum
    L = mean_i CE(y_i, q_i) over Θ and u,   + ‖onehot(argmax Φ(x_i)) + s_i − y_i‖² over u and v

Θ moves by the optimiser of the run, u and v by plain gradients with rates of their own, cut to [0, 1] where they enter
(in the form of the published code, which adds the squared error for u too). They begin near 0:
with u = v = 0 this is the cross-entropy. The published rates for CIFAR-10 are 10 for u and for v, with batches of 128;
a step of an example's vectors is divided by the size of the batch, there as here.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, at_least
from ieg_jax.methods.base import Aux, Context, Supervision, total

TITLE = "SOP"
KEYS = {
    "u_rate": Key(10.0, at_least(0), "Learning rate of u, by which a given label is taken back."),
    "v_rate": Key(10.0, at_least(0), "Learning rate of v, by which other classes are."),
}
DEVIATION, SMALLEST = 1e-8, 1e-4


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The vectors u `[num_rows, 1]` and v `[num_rows, K]`, near 0."""
    first, second = jax.random.split(rng)
    return {
        "u": DEVIATION * jax.random.normal(first, (num_rows, 1)),
        "v": DEVIATION * jax.random.normal(second, (num_rows, ctx.num_classes)),
    }


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The vectors of the batch as they are, for the loss, and after their own step, to be remembered."""
    del rng
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    label, rows, method = ctx.one_hot(batch["label"]), batch["row"], ctx.config.method
    u, v = state.method["u"][rows], state.method["v"][rows]

    def own_loss(u, v):
        guess = jax.nn.one_hot(jnp.argmax(logits, -1), label.shape[-1], dtype=label.dtype)
        error = jnp.sum(jnp.square(guess + offset(u, v, label) - label))
        return jnp.sum(cross_entropy(logits, label, u, jax.lax.stop_gradient(v))) + error

    by_u, by_v = jax.grad(own_loss, (0, 1))(u, v)
    size = label.shape[0]
    memory = {
        "u": ctx.write_rows(state.method["u"], rows, u - method.u_rate * by_u / size),
        "v": ctx.write_rows(state.method["v"], rows, v - method.v_rate * by_v / size),
    }
    return Supervision(prepared=(u, v), memory=memory)


def offset(u: jax.Array, v: jax.Array, label: jax.Array) -> jax.Array:
    """What is added, s `[B, K]`: u², at most 1, at the given label, −v², at most 1, elsewhere."""
    return jnp.minimum(jnp.square(u), 1) * label - jnp.minimum(jnp.square(v), 1) * (1 - label)


def cross_entropy(logits: jax.Array, label: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """CE(y, q), `[B]`."""
    q = jnp.maximum(jax.nn.softmax(logits) + offset(u, v, label), SMALLEST)
    q = q / jnp.sum(q, -1, keepdims=True)
    return -jnp.sum(label * jnp.log(jnp.clip(q, SMALLEST, 1)), -1)


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE of q + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    label = ctx.one_hot(batch["label"])
    terms = {
        "cross_entropy": jnp.mean(cross_entropy(logits, label, *supervision.prepared)),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)
