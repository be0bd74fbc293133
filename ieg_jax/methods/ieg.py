"""IEG: isolation, escalation, guidance. Algorithm 1 of the paper, in its order and with its symbols.

`supervise` is lines 1 to 5: everything that no gradient flows through. `loss` is line 6. Line 7, the update,
is `train.step.train_step`. Three keys take a component out, for the ablation of Table 7: `method.relabel` (λ),
`method.mixup` (MC), `method.consistency_weight=0` (UC); augmentation (AA, cutout) is `augment.strong`.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, above, at_least, boolean, within
from ieg_jax.methods.base import ALL_VIEWS, PROBE, Aux, Context, Stream, Supervision, total, trusted_loss
from ieg_jax.methods.parts import lookahead, losses, mixup
from ieg_jax.methods.parts.pseudo_labels import NORMALIZE_LOGITS, TEMPERATURE, normalize_logits, pseudo_labels

TITLE = "IEG"
UNLABELED_WEIGHT = Key(5.0, at_least(0), "p, of the mixup loss of noisy examples; of MixMatch λ_U.")
CONSISTENCY_WEIGHT = Key(20.0, at_least(0), "k, of the KL divergence between views.")
KEYS = {
    "temperature": TEMPERATURE,
    "unlabeled_weight": UNLABELED_WEIGHT,
    "consistency_weight": CONSISTENCY_WEIGHT,
    "threshold": Key(1.0, at_least(0), "T: below this ω an example counts as possibly mislabelled in mixup."),
    "label_trust_init": Key(0.9, within(0, 1), "λ⁰, where the meta-gradient of λ is taken."),
    "relabel": Key(True, boolean, "λ; False = labels are reweighted and never replaced: λ⁰ = 1 and no L_λ."),
    "mixup": Key(True, boolean, "The mixup losses; False = trusted images only guide ω and λ."),
    "normalize_logits": NORMALIZE_LOGITS,
    "supervised_scale": Key(0.5, above(0), "Factor of (L_ω + L_λ)."),
    **mixup.KEYS,
    **lookahead.KEYS,
    "meta.momentum": Key(True, boolean, "Whether the lookahead starts from the optimiser's momentum (Adam: moments)."),
    "meta.pseudo_label_gradient": Key(
        False, boolean, "Whether the meta-gradient also flows through the pseudo labels."
    ),
}
STREAMS = {"main": Stream(views=ALL_VIEWS), **PROBE}
check = mixup.check


def passes(config) -> float:
    """13 + 6 v + 3 r for v strong views and r trusted images to each noisy one: 22 for the usual v = r = 1.

    Forward are the image, the views, and the mixed pool of 2 + v images; the lookahead's gradient costs 2, the trusted
    loss with its gradient 3 r, the derivative along the lookahead 2, and the last gradient two for each forward pass.
    """
    method, views = config.method, config.augment.num_views - 1
    trusted = (config.trusted.batch_size or config.batch_size) / config.batch_size
    consistency = method.consistency_weight > 0
    pool = 3 * (2 + views) if method.mixup else 0
    return 1 + views + 2 + 3 * trusted + 2 + 2 + 2 * views * consistency + pool


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Pseudo labels, example weights ω*, label trust λ* and the mixed pool (lines 1–5)."""
    config, method = ctx.config, ctx.config.method
    label = ctx.one_hot(batch["label"])

    # Line 2: pseudo labels g from the mean prediction over the views.
    _, pseudo_label = jax.lax.stop_gradient(predict_views(ctx, state.params, state, batch))

    # Line 3: ω* and λ* from the trusted loss one step ahead.
    def noisy_loss(params, variables):
        weights, trust = variables
        logits, g = predict_views(ctx, params, state, batch)
        if not config.meta.pseudo_label_gradient:
            g = pseudo_label
        cross_entropy = losses.cross_entropy(logits, _blend(trust, label, g))
        return jnp.sum(weights * cross_entropy) + ctx.weight_decay(params)

    size = label.shape[0]
    opt_state = state.opt_state if config.meta.momentum else ctx.optimizer.init(state.params)
    trusted_loss_after, (weights_gradient, trust_gradient) = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, batch),
        (jnp.full(size, 1 / size, label.dtype), _initial_trust(method, label)),
        state.params,
        opt_state,
        ctx.optimizer,
        config.meta.learning_rate,
        config.meta.layers,
    )
    weights = lookahead.example_weights(weights_gradient)

    # Lines 4 and 5: examples below the threshold T take their pseudo label into the pool, then mixup.
    target = jnp.where((weights < method.threshold)[:, None], pseudo_label, label)
    pool = mixed_pool(ctx, batch, target, rng) if method.mixup else None
    return Supervision(
        pseudo_label=pseudo_label,
        example_weights=weights,
        label_trust=lookahead.label_trust(trust_gradient) if method.relabel else None,
        prepared=pool,
        observed={"loss/trusted_after_lookahead": trusted_loss_after},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """L = L_ω + L_λ + L_p̂ + p·L_u + k·L_KL + weight decay (line 6)."""
    del rng  # all random choices are in the supervision
    method = ctx.config.method
    label, pseudo_label = ctx.one_hot(batch["label"]), supervision.pseudo_label
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])

    # Section 2.1: reweighted with ω*, relabelled with λ*.
    initial_target = _blend(_initial_trust(method, label), label, pseudo_label)
    weighted = jnp.sum(supervision.example_weights * losses.cross_entropy(logits, initial_target))
    terms = {"weighted": method.supervised_scale * weighted}
    if method.relabel:
        relabelled_target = _blend(supervision.label_trust, label, pseudo_label)
        relabelled = jnp.mean(losses.cross_entropy(logits, relabelled_target))
        terms["relabelled"] = method.supervised_scale * relabelled

    terms |= guidance(ctx, params, state, batch, supervision, logits)
    terms["weight_decay"] = ctx.weight_decay(params)
    return total(terms), Aux(terms, logits, batch_stats)


def predict_views(ctx: Context, params, state, batch) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, K]` of the standard view, and pseudo labels g `[B, K]` from all views (section 2.2.1)."""
    method, groups = ctx.config.method, ctx.config.batch_groups
    logits = [ctx.forward(params, state.batch_stats, x)[0] for x in (batch["image"], *_views(batch))]
    return logits[0], pseudo_labels(logits, method.temperature, method.normalize_logits, groups)


def mixed_pool(ctx: Context, batch, target: jax.Array, rng) -> tuple[jax.Array, jax.Array]:
    """Mixes trusted images, noisy images and their strong views (section 2.2.2).

    Args:
      ctx: static parts of the run.
      batch: of the step.
      target: `[B, K]`, of a noisy image and of its views.
      rng: key.

    Returns:
      Images `[(1 + V) B, H, W, C]` and targets `[(1 + V) B, K]`, as `mixup.mix` lays them out.
    """
    groups, views = ctx.config.batch_groups, _views(batch)
    draw = mixup.draw(
        rng,
        groups,
        target.shape[0] // groups,
        batch["probe_label"].shape[0] // groups,
        blocks=2 + len(views),
        coefficient=ctx.config.method.mixup_coefficient,
        alpha=ctx.config.method.mixup_alpha,
    )
    probe_image = mixup.resample(draw, batch["probe_image"])
    probe_target = ctx.one_hot(mixup.resample(draw, batch["probe_label"]))
    image = mixup.mix(draw, [probe_image, batch["image"], *views])
    return image, mixup.mix(draw, [probe_target, target, *[target] * len(views)])


def guidance(ctx: Context, params, state, batch, supervision: Supervision, logits: jax.Array) -> dict[str, jax.Array]:
    """The terms that take no noisy label: L_p̂, p·L_u and k·L_KL, each with its factor.

    Args:
      ctx: static parts of the run.
      params: Θ.
      state: of the training.
      batch: of the step.
      supervision: with the mixed pool.
      logits: `[B, K]`, of the standard view.
    """
    method, groups = ctx.config.method, ctx.config.batch_groups
    views, terms = _views(batch), {}

    # Section 2.2.2: the block of the pool that began as trusted images, and the blocks that began as noisy ones.
    if supervision.prepared is not None:
        mixed_image, mixed_target = supervision.prepared
        mixed_logits, _ = ctx.forward(params, state.batch_stats, mixed_image)
        blocks = 2 + len(views)
        mixed_loss = [
            jnp.mean(
                losses.cross_entropy(
                    normalize_logits(block_logits, groups) if method.normalize_logits else block_logits,
                    block_target,
                )
            )
            for block_logits, block_target in zip(
                mixup.split(mixed_logits, groups, blocks),
                mixup.split(mixed_target, groups, blocks),
                strict=True,
            )
        ]
        terms["mixup_trusted"] = mixed_loss[0]
        terms["mixup_noisy"] = method.unlabeled_weight * sum(mixed_loss[1:]) / (blocks - 1)

    # Section 2.2.3: pseudo labels need consistent predictions.
    if method.consistency_weight:
        view_logits = [ctx.forward(params, state.batch_stats, view)[0] for view in views]
        consistency = sum(jnp.mean(losses.consistency(logits, view)) for view in view_logits) / len(views)
        terms["consistency"] = method.consistency_weight * consistency
    return terms


def _initial_trust(method, label: jax.Array) -> jax.Array:
    """λ⁰ for each example, `[B]`: 1 where labels are never replaced."""
    return jnp.full(label.shape[0], method.label_trust_init if method.relabel else 1.0, label.dtype)


def _views(batch) -> list[jax.Array]:
    """The V − 1 strong views, `[B, H, W, C]` each."""
    return [batch["views"][:, v] for v in range(batch["views"].shape[1])]


def _blend(trust: jax.Array, label: jax.Array, pseudo_label: jax.Array) -> jax.Array:
    """λ y + (1 − λ) g, row by row."""
    return trust[:, None] * label + (1 - trust[:, None]) * pseudo_label
