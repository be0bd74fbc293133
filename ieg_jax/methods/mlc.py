"""MLC: meta label correction (Zheng et al. 2021, arXiv 1911.03809): a small network learns what the labels should be.

V sees the features h of an example (what goes into the layer `head`; no gradient flows into them) and an embedding of
its given label, and says which label it should have. V is right where the step on its labels helps trusted examples:

    g_i = V(h(x_i), y_i; ψ),   V: D + `label_units` → `hidden_units` → `hidden_units` → K, tanh inside, softmax last
    Θ′(ψ) = one optimiser update of Θ on (Σ_i CE(g_i, Φ(x_i)) + Σ_c CE(y_c, Φ(x_c))) / (B + C) + weight decay
    ψ ← AMSGrad step on ∂/∂ψ of the trusted loss at Θ′(ψ)

and Θ takes the same step with the scheduled rate: its labels are those of before the step of ψ, as in the published
code, so that it needs no other gradient than the lookahead. With `learn_trusted` c are half of the trusted examples of
each batch group, drawn anew in each step, and the others judge ψ (`halves`); without it (`hmlc_K` in the published
code) nothing is learned from trusted examples, and all judge. Where V gives back the label that it sees, Θ learns the
given labels by cross-entropy.

The published code approximates the derivative over several steps of Θ, with one as its default; here it is exact, and
over one. `label_units` and `label_rate` are those of its command lines for CIFAR (120 epochs, 1,000 trusted images);
there the lookahead has the scheduled rate, here `meta.learning_rate`, and the trusted loss there is without weight
decay, as here with `meta.weight_decay=False`.
"""

import itertools

import jax
import jax.numpy as jnp
import optax

from ieg_jax.config import Key, above, at_least, boolean
from ieg_jax.errors import UserError
from ieg_jax.methods.base import MAIN, PROBE, Aux, Context, Stream, Supervision, total, trusted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "MLC"
STREAMS = {MAIN: Stream(), **PROBE}
KEYS = {
    **lookahead.KEYS,
    "label_units": Key(128, at_least(1), "Size of the embedding of a given label that V sees."),
    "hidden_units": Key(128, at_least(1), "Units of each of the two hidden layers of V."),
    "label_rate": Key(3e-4, above(0), "Learning rate of V (AMSGrad)."),
    "learn_trusted": Key(True, boolean, "Whether half of the trusted images are learned from, and the others judge V."),
}
_ADAM = optax.scale_by_amsgrad()


def check(config) -> None:
    """Halves of a batch of trusted images have to be there in each group."""
    if config.method.learn_trusted:
        check_halves(config)


def check_halves(config) -> None:
    """Raises UserError where the trusted images of a batch group cannot be halved."""
    size = config.trusted.batch_size or config.batch_size
    if size % (2 * config.batch_groups):
        raise UserError(
            f"method.name={config.method.name} halves the {size} trusted images of each batch in "
            f"{config.batch_groups} group(s): set trusted.batch_size to a multiple of {2 * config.batch_groups}"
        )


def passes(config) -> float:
    """5 + 3 r for r trusted images to each noisy one: step and lookahead 3, trusted ones 3 r, derivative along it 2."""
    return 5 + 3 * (config.trusted.batch_size or config.batch_size) / config.batch_size


def init(ctx: Context, rng, num_rows: int) -> dict:
    """ψ and the moments of its optimiser."""
    del num_rows
    method, initializers = ctx.config.method, jax.nn.initializers
    sizes = (ctx.num_features + method.label_units, method.hidden_units, method.hidden_units, ctx.num_classes)
    keys = jax.random.split(rng, len(sizes))
    layers = [
        {"kernel": initializers.glorot_normal()(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=False)
    ]
    embedding = initializers.glorot_uniform()(keys[-1], (ctx.num_classes, method.label_units))
    psi = {"embedding": embedding, **dict(zip(("first", "second", "out"), layers, strict=True))}
    return {"psi": psi, "adam": _ADAM.init(psi)}


def correct(psi, features: jax.Array, label: jax.Array) -> jax.Array:
    """V: features `[B, D]` and given labels `[B]` -> labels `[B, K]`, rows that sum to 1."""
    hidden = jnp.concatenate([features, psi["embedding"][label]], -1)
    for name in ("first", "second"):
        hidden = jnp.tanh(hidden @ psi[name]["kernel"] + psi[name]["bias"])
    return jax.nn.softmax(hidden @ psi["out"]["kernel"] + psi["out"]["bias"])


def halves(ctx: Context, batch: dict[str, jax.Array], rng) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Two random halves of the trusted images of each batch group, each as in a batch.

    The images of a batch come in the order of their classes, the same at each step: without a draw a class could be
    always in one half. Where a batch has more images than there are, all copies of one are in the same half, those of
    the image in the middle apart: what judges is not what was learned from.
    """
    groups = ctx.config.batch_groups
    places = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(rng, row)))(batch["probe_row"])
    order = jnp.argsort(places.reshape(groups, -1), -1)

    def part(array, number):
        of_groups = array.reshape(groups, -1, *array.shape[1:])
        chosen = jnp.split(order, 2, -1)[number]
        return jax.vmap(lambda images, chosen: images[chosen])(of_groups, chosen).reshape(-1, *array.shape[1:])

    first, second = ({f"probe_{name}": part(batch[f"probe_{name}"], n) for name in ("image", "label")} for n in (0, 1))
    return first, second


def terms_of(
    ctx: Context, params, state, learned: dict[str, jax.Array] | None, target: jax.Array, logits: jax.Array
) -> dict[str, jax.Array]:
    """The parts of the loss.

    Args:
      ctx: the context.
      params: Θ.
      state: with the moving averages.
      learned: the trusted images that are learned from, `halves`; None = none.
      target: labels `[B, K]`.
      logits: `[B, K]`, what Φ gives for their images.
    """
    corrected = jnp.sum(losses.cross_entropy(logits, target))
    if learned is None:
        return {"corrected": corrected / len(target), "weight_decay": ctx.weight_decay(params)}
    trusted, _ = ctx.forward(params, state.batch_stats, learned["probe_image"])
    trusted = losses.cross_entropy(trusted, ctx.one_hot(learned["probe_label"]))
    size = len(target) + len(trusted)
    return {
        "corrected": corrected / size,
        "trusted": jnp.sum(trusted) / size,
        "weight_decay": ctx.weight_decay(params),
    }


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The labels that V gives, and a step of ψ."""
    psi = state.method["psi"]
    learned, judging = halves(ctx, batch, rng) if ctx.config.method.learn_trusted else (None, batch)

    def noisy_loss(params, psi):
        logits, features, _ = ctx.forward_with_features(params, state.batch_stats, batch["image"])
        target = correct(psi, jax.lax.stop_gradient(features), batch["label"])
        return total(terms_of(ctx, params, state, learned, target, logits))

    trusted_loss_after, gradient = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, judging),
        psi,
        state.params,
        state.opt_state,
        ctx.optimizer,
        ctx.config.meta.learning_rate,
        ctx.config.meta.layers,
    )
    direction, moments = _ADAM.update(gradient, state.method["adam"])
    _, features, _ = ctx.forward_with_features(state.params, state.batch_stats, batch["image"])
    target = correct(psi, features, batch["label"])
    return Supervision(
        pseudo_label=target,
        label_trust=jnp.take_along_axis(target, batch["label"][:, None], -1)[:, 0],
        prepared=learned,
        memory={
            "psi": jax.tree.map(lambda p, d: p - ctx.config.method.label_rate * d, psi, direction),
            "adam": moments,
        },
        observed={"loss/trusted_after_lookahead": trusted_loss_after},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE of the corrected and the trusted labels + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    terms = terms_of(ctx, params, state, supervision.prepared, supervision.pseudo_label, logits)
    return total(terms), Aux(terms, logits, batch_stats)
