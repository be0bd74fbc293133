"""MixMatch (Berthelot et al. 2019, arXiv 1905.02249), what the paper compares EG with in Table 6.

Semi-supervised: the trusted images X have labels, the noisy images U have none. In the symbols of `ieg`, with Φ the
logits and V views of each noisy image:

    q = P^{1/τ} / Σ_j P_j^{1/τ},  P = mean over the views of softmax(Φ(u)),  no gradient
    W = a random permutation of the pool X ∪ U, all views in it, each with q as its target
    X′, U′ = mixup of X and U with the element of W at the same place, β ~ Beta(α, α), β ← max(β, 1 − β)
    L = mean_{X′} CE(y, Φ(x)) + λ_U min(step / ramp, 1) mean_{U′} (1/K) ‖q − softmax(Φ(u))‖² + weight decay

τ is `method.temperature`, α `method.mixup_alpha`, λ_U `method.unlabeled_weight`, ramp `method.unlabeled_ramp_steps`.
Batch norm uses batch statistics in every forward pass, and that of the mixed pool moves its averages, as in the
authors' code (google-research/mixmatch). That differs in two things besides the network: it normalises parts of the
pool as large as X, into which X and U are dealt evenly, where here a whole group is normalised together. And X here is
drawn from the trusted images of a batch with replacement, as in IEG's mixed pool, where theirs has each of them.

Both views of MixMatch are weak and made from the image itself: `augment.strong` as `augment.standard`, and
`augment.views_of=original`. Its authors train on CIFAR-10 with batches of 64, crops and flips, α = 0.75 (then
`method.mixup_coefficient=exact`), λ_U = 75 (CIFAR-100: 150) reached after 16,384 steps (1,024 · 1,024 images), and with
`optimizer.name=adamw`, a constant rate of 0.002, `optimizer.weight_decay=0.02` on kernels, and a moving average of
0.999 without warm-up.
"""

import jax
import jax.numpy as jnp

from ieg_jax.config import Key, at_least
from ieg_jax.methods import ieg
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses, mixup
from ieg_jax.methods.parts.pseudo_labels import TEMPERATURE, pseudo_labels

TITLE = "MixMatch"
KEYS = {
    "temperature": TEMPERATURE,
    "unlabeled_weight": ieg.UNLABELED_WEIGHT,
    "unlabeled_ramp_steps": Key(
        0, at_least(0, "0 (none) or a number of steps"), "λ_U grows linearly from 0 over this many steps; 0 = at once."
    ),
    **mixup.KEYS,
}
STREAMS = ieg.STREAMS
check = mixup.check


def passes(config) -> float:
    """The views forward, and the mixed pool forward and backward."""
    views = config.augment.num_views - 1
    return 1 + views + 3 * (2 + views)


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Guesses q of the noisy images `[B, K]`, and the mixed pool X′ ∪ U′."""
    views = (batch["image"], *jnp.moveaxis(batch["views"], 1, 0))
    logits = [ctx.forward(state.params, state.batch_stats, view)[0] for view in views]
    guess = pseudo_labels(logits, ctx.config.method.temperature, normalize=False)
    return Supervision(pseudo_label=guess, prepared=ieg.mixed_pool(ctx, batch, guess, rng))


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Cross-entropy of X′ + λ_U(step) · squared error of U′ + weight decay."""
    del rng  # all random choices are in the supervision
    method, groups = ctx.config.method, ctx.config.batch_groups
    mixed_image, mixed_target = supervision.prepared
    mixed_logits, batch_stats = ctx.forward(params, state.batch_stats, mixed_image)
    blocks = 2 + batch["views"].shape[1]
    trusted, *noisy = zip(
        mixup.split(mixed_logits, groups, blocks), mixup.split(mixed_target, groups, blocks), strict=True
    )
    squared_error = sum(jnp.mean(losses.squared_error(*block)) for block in noisy) / len(noisy)
    terms = {
        "mixup_trusted": jnp.mean(losses.cross_entropy(*trusted)),
        "mixup_noisy": method.unlabeled_weight * ramp(state.step, method.unlabeled_ramp_steps) * squared_error,
        "weight_decay": ctx.weight_decay(params),
    }
    # For the metrics alone, and the same computation as that of the guesses: the compiler makes one of the two.
    logits, _ = ctx.forward(jax.lax.stop_gradient(params), state.batch_stats, batch["image"])
    return total(terms), Aux(terms, logits, batch_stats)


def ramp(step: jax.Array, length: int) -> jax.Array | float:
    """min(step / length, 1): from 0 at the first step to 1 after `length` steps; 1 throughout where `length` is 0."""
    return jnp.minimum(step / length, 1.0) if length else 1.0
