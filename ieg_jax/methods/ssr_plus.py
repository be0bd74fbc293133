"""SSR+: sample selection and relabelling with consistency of features (Feng et al. 2022, arXiv 2111.11288).

Selection, relabelling and the loss of what is selected are those of `ssr`. Besides, from all examples of the training
set, selected or not, the network learns that two views of an image are one thing, for which no label is needed:

    L = L of `ssr` + λ_fc mean_i −cos(h(f(e(x̂_i))), f(e(x_i)))   without gradient through the second argument

with x the standard and x̂ the strong view, e what goes into the last layer, and f, h two small networks (dense, batch
norm, ReLU, dense; 256 units, 128 outputs) that are trained along (`parts/heads.py`) and predict nothing. This is the
form of the published code: one direction, the strong view towards the standard one.

There what is selected is mixed in two strong views of each image, here in its standard view, as in `ssr`; and there the
views of this term move the averages of batch norm too. Its settings for CIFAR-10 and CIFAR-100: λ_fc = 1, θ_s = 1,
k = 200, and θ_r = 0.9, but 0.8 for CIFAR-100 with half of the labels wrong or more. With λ_fc = 0 this is `ssr`.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, at_least
from ieg_jax.methods import ssr
from ieg_jax.methods.base import MAIN, Aux, Context, Stream, Supervision, total
from ieg_jax.methods.parts import heads

TITLE = "SSR+"
STREAMS = {MAIN: Stream(), "every": Stream(views=2)}  # of `every` nothing is ever left out; class_weight balances both
KEYS = {**ssr.KEYS, "feature_weight": Key(1.0, at_least(0), "λ_fc, of the consistency of features.")}
UNITS, OUTPUTS = 256, 128


def passes(config) -> float:
    """SSR, the standard view forward, the strong one forward and backward."""
    del config
    return 3.0 + 1 + 3


def init(ctx: Context, rng, num_rows: int) -> dict:
    """What SSR remembers, and the weights of f and h."""
    weights = {}
    for name, inputs, key in zip("fh", (ctx.num_features, OUTPUTS), jax.random.split(rng), strict=True):
        first, last = jax.random.split(key)
        # Batch norm follows at once, and would take a bias away again: this one comes behind it.
        hidden = heads.dense(ctx, first, inputs, UNITS) | {"scale": jnp.ones(UNITS, ctx.float_type)}
        weights[name] = {"hidden": hidden, "out": heads.dense(ctx, last, UNITS, OUTPUTS)}
    return ssr.init(ctx, rng, num_rows) | {"heads": heads.begin(ctx, weights)}


def applied(weights, features: jax.Array, groups: int) -> jax.Array:
    """What f or h makes of its input: `[n, D]` -> `[n, OUTPUTS]`; batch norm inside each of `groups` groups."""
    hidden = features.astype(weights["hidden"]["kernel"].dtype) @ weights["hidden"]["kernel"]
    grouped = hidden.reshape(groups, -1, hidden.shape[-1])
    mean, variance = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    normal = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(hidden.shape)
    hidden = jax.nn.relu(normal * weights["hidden"]["scale"] + weights["hidden"]["bias"])
    return hidden @ weights["out"]["kernel"] + weights["out"]["bias"]


def disagreement(weights, standard: jax.Array, strong: jax.Array, groups: int) -> jax.Array:
    """Mean −cos(h(f(strong)), f(standard)), in [−1, 1], a scalar.

    Args:
      weights: of f and h.
      standard: features `[n, D]`, without gradient.
      strong: features `[n, D]`.
      groups: of batch norm.
    """
    towards = jax.lax.stop_gradient(applied(weights["f"], standard, groups))
    predicted = applied(weights["h"], applied(weights["f"], strong, groups), groups)
    return -jnp.mean(jnp.sum(_unit(predicted) * _unit(towards), -1))


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors), -1, keepdims=True), 1e-16))


def features(ctx: Context, params, state, batch) -> tuple[jax.Array, jax.Array]:
    """Of the standard view, without gradient, and of the strong one of the stream `every`."""
    fixed = jax.lax.stop_gradient(params)
    _, standard, _ = ctx.forward_with_features(fixed, state.batch_stats, batch["every_image"])
    _, strong, _ = ctx.forward_with_features(params, state.batch_stats, batch["every_views"][:, 0])
    return standard, strong


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """That of SSR with f and h as they are, and these after their own step."""
    plain, before = ssr.supervise(ctx, state, batch, rng), state.method["heads"]
    seen = features(ctx, state.params, state, batch)
    weight, groups = ctx.config.method.feature_weight, ctx.config.batch_groups
    after = heads.moved(ctx, before, lambda weights: weight * disagreement(weights, *seen, groups), state.step)
    return plain._replace(prepared=(plain.prepared, before.weights), memory={**state.method, "heads": after})


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """The loss of SSR + λ_fc times the disagreement of features."""
    plain, weights = supervision.prepared
    _, aux = ssr.loss(ctx, params, state, batch, supervision._replace(prepared=plain), rng)
    apart = disagreement(weights, *features(ctx, params, state, batch), ctx.config.batch_groups)
    terms = aux.terms | {"features": ctx.config.method.feature_weight * apart}
    return total(terms), aux._replace(terms=terms)


def on_epoch(ctx: Context, state, look):
    """As SSR: labels, and rows of the stream `main`."""
    changed, rows = ssr.on_epoch(ctx, state, look)
    return changed.replace(method=state.method | changed.method), rows
