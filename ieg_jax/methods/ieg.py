"""IEG: isolation, escalation, guidance. Algorithm 1 of the paper, in its order and with its symbols.

`supervise` is lines 1 to 5: everything that no gradient flows through. `loss` is line 6. Line 7, the update,
is `steps.train_step`.
"""

import jax
import jax.numpy as jnp

from ieg_jax import losses, meta, mixup
from ieg_jax.methods.base import Aux, Context, Supervision, total, trusted_loss
from ieg_jax.pseudo_labels import normalize_logits, pseudo_labels

NEEDS = frozenset({"views", "probe"})
TRAINS_ON = "noisy"


def supervise(context: Context, state, batch, rng) -> Supervision:
    """Pseudo labels, example weights ω*, label trust λ* and the mixed pool (lines 1–5)."""
    config, method = context.config, context.config.method
    groups = config.batch_groups
    label = context.one_hot(batch["label"])
    views = _views(batch)

    # Line 2: pseudo labels g from the mean prediction over the views.
    def predict(params):
        logits = [context.forward(params, state.batch_stats, x)[0] for x in (batch["image"], *views)]
        return logits[0], pseudo_labels(logits, method.temperature, method.normalize_logits, groups)

    _, pseudo_label = jax.lax.stop_gradient(predict(state.params))

    # Line 3: ω* and λ* from the trusted loss one step ahead.
    def noisy_loss(params, variables):
        weights, trust = variables
        logits, g = predict(params)
        if not config.meta.pseudo_label_gradient:
            g = pseudo_label
        cross_entropy = losses.cross_entropy(logits, _blend(trust, label, g))
        return jnp.sum(weights * cross_entropy) + context.weight_decay(params)

    size = label.shape[0]
    initial = (jnp.full(size, 1 / size, label.dtype), jnp.full(size, method.label_trust_init, label.dtype))
    opt_state = state.opt_state if config.meta.momentum else context.optimizer.init(state.params)
    probe_loss_after, (weights_gradient, trust_gradient) = meta.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(context, params, state, batch),
        initial,
        state.params,
        opt_state,
        context.optimizer,
        config.meta.learning_rate,
        config.meta.layers,
    )
    weights = meta.example_weights(weights_gradient)

    # Lines 4 and 5: examples below the threshold T take their pseudo label into the pool, then mixup.
    target = jnp.where((weights < method.threshold)[:, None], pseudo_label, label)
    draw = mixup.draw(
        rng,
        groups,
        size // groups,
        batch["probe_label"].shape[0] // groups,
        blocks=2 + len(views),
        coefficient=method.mixup_coefficient,
    )
    probe_image = mixup.resample(draw, batch["probe_image"])
    probe_target = context.one_hot(mixup.resample(draw, batch["probe_label"]))
    return Supervision(
        pseudo_label=pseudo_label,
        example_weights=weights,
        label_trust=meta.label_trust(trust_gradient),
        mixed_image=mixup.mix(draw, [probe_image, batch["image"], *views]),
        mixed_target=mixup.mix(draw, [probe_target, target, *[target] * len(views)]),
        probe_loss=probe_loss_after,
    )


def loss(context: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """L = L_ω + L_λ + L_p̂ + p·L_u + k·L_KL + weight decay (line 6)."""
    del rng  # all random choices are in the supervision
    method, groups = context.config.method, context.config.batch_groups
    label, pseudo_label = context.one_hot(batch["label"]), supervision.pseudo_label
    views = _views(batch)

    logits, batch_stats = context.forward(params, state.batch_stats, batch["image"])
    view_logits = [context.forward(params, state.batch_stats, view)[0] for view in views]
    mixed_logits, _ = context.forward(params, state.batch_stats, supervision.mixed_image)

    # Section 2.1: reweighted with ω*, relabelled with λ*.
    initial_target = _blend(jnp.full(label.shape[0], method.label_trust_init), label, pseudo_label)
    relabelled_target = _blend(supervision.label_trust, label, pseudo_label)
    weighted = jnp.sum(supervision.example_weights * losses.cross_entropy(logits, initial_target))
    relabelled = jnp.mean(losses.cross_entropy(logits, relabelled_target))

    # Section 2.2.2: the block of the pool that began as trusted images, and the blocks that began as noisy ones.
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
            mixup.split(supervision.mixed_target, groups, blocks),
            strict=True,
        )
    ]
    trusted_mixup, noisy_mixup = mixed_loss[0], sum(mixed_loss[1:]) / (blocks - 1)

    # Section 2.2.3: pseudo labels need consistent predictions.
    consistency = sum(jnp.mean(losses.consistency(logits, view)) for view in view_logits) / len(views)

    terms = {
        "weighted": method.supervised_scale * weighted,
        "relabelled": method.supervised_scale * relabelled,
        "mixup_trusted": trusted_mixup,
        "mixup_noisy": method.unlabeled_weight * noisy_mixup,
        "consistency": method.consistency_weight * consistency,
        "weight_decay": context.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)


def _views(batch) -> list[jax.Array]:
    """The V − 1 strong views, `[B, H, W, C]` each."""
    return [batch["views"][:, v] for v in range(batch["views"].shape[1])]


def _blend(trust: jax.Array, label: jax.Array, pseudo_label: jax.Array) -> jax.Array:
    """λ y + (1 − λ) g, row by row."""
    return trust[:, None] * label + (1 - trust[:, None]) * pseudo_label
