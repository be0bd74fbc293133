"""ProMix: as many clean examples as possible, and no class favoured (Xiao et al. 2023, IJCAI; arXiv 2207.10276).

For `pretrain_epochs` two networks learn the given labels. Then each keeps, for itself, the labels

    of small loss, class by class: at the end of each epoch the ⌈ρ N / K⌉ examples of each class with the least loss
    of high confidence: in each step those whose label has a probability above τ
    guessed, after `guess_after_epochs`: where both networks see the same class, both above τ, until a share
        `guess_share` of the batch is kept, the surest first; the class is argmax Φ(x) − α log π of its own

Its own mean prediction over the kept examples of the batches, π, is remembered (a moving average), and so is that over
the rest, π'. A loss adds its logarithm to the logits and so takes a margin from frequent classes, a pseudo label
subtracts it. With CE_π(t, z) = CE(t, z + α log π), x̂ the strong view and x̃ a mixture of kept images in pairs,
δ = max(β, 1 − β) with β ~ Beta(4, 4):

    L(z) = mean_kept CE_π(t, z(x)) + w [CE_π(t, z(x̂)) + CE_π(t̃, z(x̃))]
    u(z) = mean_rest CE_π'(q, z(x)) + w CE_π'(q, z(x̂)),   q = sharpen(softmax(Φ(x) − α log π'), T)
    L = L(Φ) + L(Ψ) + v u(Ψ) + weight decay,   added up over the networks

Ψ is a second, linear head on the same features (`parts/heads.py`): pseudo labels that may be wrong reach the features
through it, and never the head that predicts and makes them. w rises linearly to 1 in `ramp_epochs`, counted from the
beginning; v to `rest_weight` in twice as long, and is 0 from then on, as in the published code.

That code mixes anew for Ψ, and mixes a second time by masks from Fourier space (FMix); here one mixture serves both
heads, without FMix. Under asymmetric noise it has a penalty on confidence while it pretrains, which is not here. Both π
begin at 1 / K. Its settings: 600 epochs, guessing after 350; for CIFAR-10 and CIFAR-10N ρ = 0.5 (0.7 with 20 % uniform
noise), τ = 0.99, α = 0.8 and 10 epochs of pretraining; for CIFAR-100 and CIFAR-100N the same ρ, τ = 0.95, α = 0.5 and
30 epochs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, above, at_least, within
from ieg_jax.methods.base import MAIN, Aux, Context, Stream, Supervision, total
from ieg_jax.methods.dividemix import sharpened
from ieg_jax.methods.parts import heads, losses, mixup
from ieg_jax.methods.parts.pseudo_labels import TEMPERATURE

TITLE = "ProMix"
NETWORKS = 2
STREAMS = {MAIN: Stream(views=2)}
KEYS = {
    "temperature": TEMPERATURE,
    "pair_alpha": mixup.PAIR_ALPHA,
    "pretrain_epochs": Key(10.0, at_least(0), "Epochs on the labels as given, before the first selection."),
    "select_share": Key(0.5, within(0, 1), "ρ, of an average class: so many of each with the least loss are kept."),
    "confidence_threshold": Key(0.99, within(0, 1), "τ, above which a prediction is of high confidence."),
    "guess_after_epochs": Key(350.0, at_least(0), "Epochs before labels are guessed."),
    "guess_share": Key(0.9, within(0, 1), "Labels are guessed until this share of a batch is kept."),
    "debias_strength": Key(0.8, at_least(0), "α, of what is done against favoured classes."),
    "bias_momentum": Key(0.9999, within(0, 1, open_end=True), "Share of the old value that π keeps in a step."),
    "ramp_epochs": Key(50.0, above(0), "Epochs in which w rises to 1."),
    "rest_weight": Key(0.1, at_least(0), "v in the end, of the examples that are not kept."),
}
KEPT, REST = 0, 1  # places of π and π'


class Plan(NamedTuple):
    """What a step learns; with a leading axis of the two networks, but for the scalars."""

    kept: jax.Array  # [2, B], 1 or 0
    target: jax.Array  # [2, B, K], of the kept
    guess: jax.Array  # q [2, B, K], of the rest
    mixed: tuple[jax.Array, jax.Array]  # x̃ [2, B, H, W, C] and t̃ [2, B, K]
    shift: jax.Array  # α log π and α log π' [2 (KEPT, REST), 2, K]
    pseudo: Any  # weights of Ψ
    begun: jax.Array  # 1 after the first selection
    strong: jax.Array  # w
    rest: jax.Array  # v


def passes(config) -> float:
    """Both networks learn from the image, its strong view and a mixture."""
    del config
    return 2 * 3 * 3.0


def init(ctx: Context, rng, num_rows: int) -> dict:
    """Whose loss is small for each network, `[num_rows, 2]`; π, π' `[2, 2, K]`; Ψ; whether anything is selected yet."""
    layers = jax.vmap(lambda key: heads.dense(ctx, key, ctx.num_features, ctx.num_classes))(jax.random.split(rng))
    return {
        "small_loss": jnp.zeros((num_rows, 2), bool),
        "bias": jnp.full((2, 2, ctx.num_classes), 1 / ctx.num_classes, ctx.float_type),
        "heads": heads.begin(ctx, layers),
        "begun": jnp.zeros((), jnp.int32),
    }


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """The plan of the step, and π, π' and Ψ after it."""
    method, memory, label = ctx.config.method, state.method, ctx.one_hot(batch["label"])
    epochs, begun = state.step / ctx.steps_per_epoch, memory["begun"] > 0
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    p, shift = jax.nn.softmax(logits), method.debias_strength * jnp.log(memory["bias"])
    as_given = memory["small_loss"][batch["row"]].T | (jnp.sum(label * p, -1) > method.confidence_threshold) | ~begun
    guessed = agreed(p, as_given, method.confidence_threshold, method.guess_share)
    kept = as_given | (guessed & begun & (epochs > method.guess_after_epochs))
    seen = ctx.one_hot(jnp.argmax(logits - shift[KEPT][:, None], -1))
    target = jnp.where(as_given[..., None], label, seen)
    pairs = draw_pairs(rng, kept, ctx.config.batch_groups, method.pair_alpha)
    share = begun.astype(label.dtype)
    growth = epochs / method.ramp_epochs
    plan = Plan(
        kept.astype(label.dtype),
        target,
        sharpened(jax.nn.softmax(logits - shift[REST][:, None]), method.temperature),
        (jax.vmap(mixup.mix_pairs, (0, None))(pairs, batch["image"]), jax.vmap(mixup.mix_pairs)(pairs, target)),
        shift,
        memory["heads"].weights,
        share,
        share * jnp.minimum(growth, 1),
        share * method.rest_weight * jnp.where(growth < 2, growth / 2, 0),
    )
    outputs, _ = outputs_of(ctx, state.params, state, batch, plan)
    after = heads.moved(
        ctx, memory["heads"], lambda weights: total(pseudo_terms(outputs, plan._replace(pseudo=weights))), state.step
    )
    after = jax.tree.map(lambda new, old: jnp.where(begun, new, old), after, memory["heads"])
    masks = jnp.stack([plan.kept, 1 - plan.kept])
    bias = jnp.where(begun, averaged(memory["bias"], p, masks, method.bias_momentum), memory["bias"])
    weights = plan.kept.mean(0)
    return Supervision(
        example_weights=weights / jnp.maximum(weights.sum(), 1e-12),
        prepared=plan,
        memory={**memory, "bias": bias, "heads": after},
        observed={"train/share_kept": jnp.mean(plan.kept), "train/share_guessed": jnp.mean(kept & ~as_given)},
    )


def agreed(p: jax.Array, kept: jax.Array, threshold: float, share: float) -> jax.Array:
    """Whose labels each network guesses: `[2, B]` bool.

    Args:
      p: probabilities `[2, B, K]`.
      kept: `[2, B]` bool, who is kept already.
      threshold: τ.
      share: of the batch, up to which more are kept.
    """
    sure, size = jnp.max(p, -1), p.shape[1]
    both = jnp.all(sure > threshold, 0) & (jnp.argmax(p[0], -1) == jnp.argmax(p[1], -1))
    more = both & ~kept
    rank = jnp.argsort(jnp.argsort(-jnp.where(more, sure.mean(0), -1), axis=-1), axis=-1)
    return more & (rank < math.floor(share * size) - jnp.sum(kept, -1, keepdims=True))


def draw_pairs(rng, kept: jax.Array, groups: int, alpha: float) -> mixup.Pairs:
    """Partners among the kept for the kept, and among the rest for the rest, of each network; δ of each.

    Args:
      rng: key.
      kept: `[2, B]` bool.
      groups: of the batch, in which partners are drawn.
      alpha: of the Beta distribution.
    """
    order_rng, share_rng = jax.random.split(rng)
    kept = kept.reshape(len(kept), groups, -1)
    places = jnp.argsort(~kept, axis=-1, stable=True)  # the kept first, in their order
    shuffled = jnp.argsort(jax.random.uniform(order_rng, kept.shape) + ~kept, axis=-1)  # the kept first, in any order
    share = jax.random.beta(share_rng, alpha, alpha, kept.shape[:1])
    partner = jnp.take_along_axis(shuffled, jnp.argsort(places, axis=-1), -1)
    return mixup.Pairs(partner, jnp.maximum(share, 1 - share))


def averaged(bias: jax.Array, p: jax.Array, masks: jax.Array, momentum: float) -> jax.Array:
    """The means π and π' after a batch, `[2, 2, K]`; where nobody is of a kind it stays.

    Args:
      bias: before it.
      p: probabilities `[2, B, K]`.
      masks: `[2 (KEPT, REST), 2, B]`, 1 or 0.
      momentum: share of the old value.
    """
    count = masks.sum(-1, keepdims=True)
    mean = jnp.einsum("mrb,rbk->mrk", masks, p) / jnp.maximum(count, 1)
    return jnp.where(count > 0, momentum * bias + (1 - momentum) * mean, bias)


def outputs_of(ctx: Context, params, state, batch, plan: Plan):
    """Logits and features of the image, the strong view and the mixture, three each; moving averages of the first."""
    logits, features, batch_stats = zip(
        ctx.forward_with_features(params, state.batch_stats, batch["image"]),
        ctx.forward_with_features(params, state.batch_stats, batch["views"][:, 0]),
        ctx.forward_with_features(params, state.batch_stats, plan.mixed[0], images_of_each=True),
        strict=True,
    )
    return (logits, features), batch_stats[0]


def kept_loss(logits, plan: Plan) -> jax.Array:
    """L(z), of logits of the image, the strong view and the mixture; summed over the networks."""
    targets = (plan.target, plan.target, plan.mixed[1])
    image, strong, mixed = (
        losses.cross_entropy(z + plan.shift[KEPT][:, None], t) for z, t in zip(logits, targets, strict=True)
    )
    return _mean_over(plan.kept, image + plan.strong * (strong + mixed))


def rest_loss(logits, plan: Plan) -> jax.Array:
    """u(z), of logits of the image, the strong view and the mixture; summed over the networks."""
    image, strong = (losses.cross_entropy(z + plan.shift[REST][:, None], plan.guess) for z in logits[:2])
    return _mean_over(1 - plan.kept, image + plan.strong * strong)


def _mean_over(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sum(mask * values, -1) / jnp.maximum(jnp.sum(mask, -1), 1))


def pseudo_terms(outputs, plan: Plan) -> dict[str, jax.Array]:
    """The terms of Ψ."""
    kernel, bias = plan.pseudo["kernel"], plan.pseudo["bias"][:, None]
    logits = [features.astype(kernel.dtype) @ kernel + bias for features in outputs[1]]
    return {"pseudo_head": plan.begun * kept_loss(logits, plan), "rest": plan.rest * rest_loss(logits, plan)}


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """L(Φ) + L(Ψ) + v u(Ψ) + weight decay, summed over the networks; before the first selection L(Φ) of all."""
    del rng
    plan = supervision.prepared
    outputs, batch_stats = outputs_of(ctx, params, state, batch, plan)
    terms = {
        "kept": kept_loss(outputs[0], plan),
        **pseudo_terms(outputs, plan),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, outputs[0][0].mean(0), batch_stats)


def on_epoch(ctx: Context, state, look):
    """The examples of small loss, for each network by its own losses."""
    method = ctx.config.method
    if look.epoch < method.pretrain_epochs:
        return state, None
    p = look.probabilities()[:, np.arange(len(look.labels)), look.labels]
    # The loss falls as p rises.
    small = [small_losses(-one, look.labels, ctx.num_classes, method.select_share) for one in p]
    return state.replace(method={**state.method, "small_loss": np.stack(small, 1), "begun": np.int32(1)}), None


def small_losses(loss: np.ndarray, label: np.ndarray, num_classes: int, share: float) -> np.ndarray:
    """The ⌈share · N / K⌉ examples of each class with the least loss, at least one, at most all: `[N]` bool.

    Args:
      loss: `[N]`, or what rises with it.
      label: `[N]`.
      num_classes: K.
      share: ρ.
    """
    count = max(math.ceil(share * len(label) / num_classes), 1)
    small = np.zeros(len(label), bool)
    for number in range(num_classes):
        rows = np.flatnonzero(label == number)
        small[rows[np.argsort(loss[rows], kind="stable")[:count]]] = True
    return small
