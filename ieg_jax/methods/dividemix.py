"""DivideMix (Li et al. 2020, arXiv 2002.07394): two networks divide the data for each other, and train by MixMatch.

For `divide_epochs` both learn the given labels. Then, at the end of each epoch, two normal distributions are fitted to
each network's losses of all examples, brought to [0, 1]; w_i is the probability of the one with the smaller mean, a
right label. Network r trains with the w of the *other* one: examples with w_i > `clean_threshold` keep a label, the
others lose it. With q̄ the mean of the own predictions for two views of an image, and q̄' that of both networks:

    with a label:  target = sharpen(w y + (1 − w) q̄),   without: target = sharpen(q̄'),   sharpen(t)_c ∝ t_c^(1/τ)
    all views of all images are mixed in pairs, δ = max(β, 1 − β) with β ~ Beta(α, α), and by the first of a pair
    L = mean_labelled CE + λ_u mean_unlabelled ‖target − Φ‖² / K + Σ_c π_c log(π_c / mean Φ_c) + weight decay

for each network; the losses are added up. λ_u rises linearly in 16 epochs to `unlabelled_strength` (25 there, τ = 0.5,
α = 4, threshold 0.5). The published code draws as many examples with as without a label; here a batch has them as they
come. The second view is the strong one (`augment.strong`); there both are crops and flips. There, besides: with
asymmetric noise the entropy is part of the loss in the first epochs, with 90 % noise the losses are means over five
epochs, the other network guesses with its averages of batch norm, and `divide_epochs` is 30 for CIFAR-100.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, at_least, within
from ieg_jax.methods.base import MAIN, Aux, Context, Stream, Supervision, total
from ieg_jax.methods.parts import losses, mixup
from ieg_jax.methods.parts.pseudo_labels import TEMPERATURE

TITLE = "DivideMix"
NETWORKS = 2
STREAMS = {MAIN: Stream(views=2)}
KEYS = {
    "temperature": TEMPERATURE,
    "pair_alpha": mixup.PAIR_ALPHA,
    "divide_epochs": Key(10.0, at_least(0), "Epochs on the labels as given, before the first division."),
    "clean_threshold": Key(0.5, within(0, 1), "An example whose w is larger keeps its label."),
    "unlabelled_strength": Key(25.0, at_least(0), "λ_u in the end, of examples without a label."),
}
RAMP_EPOCHS = 16.0


def passes(config) -> float:
    """Both networks see both views, and learn from the mixture of these."""
    del config
    return 2 * (2 + 3 * 2.0)


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """W of each example for each network, `[num_rows, 2]`; and the epoch of the last division, 0 = none yet."""
    del ctx, rng
    return {"clean": jnp.ones((num_rows, 2)), "divided": jnp.zeros((), jnp.int32)}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Targets `[2, B, K]`, which examples have a label `[2, B]`, and the pairs."""
    method, label = ctx.config.method, ctx.one_hot(batch["label"])
    each = [
        jax.nn.softmax(ctx.forward(state.params, state.batch_stats, images)[0])
        for images in (batch["image"], batch["views"][:, 0])
    ]
    own = (each[0] + each[1]) / 2
    clean = state.method["clean"][batch["row"]].T  # [2, B]
    labelled = (clean > method.clean_threshold) | (state.method["divided"] == 0)
    refined = clean[..., None] * label + (1 - clean[..., None]) * own
    target = sharpened(jnp.where(labelled[..., None], refined, own.mean(0)), method.temperature)
    target = jnp.where(state.method["divided"] == 0, jnp.broadcast_to(label, target.shape), target)
    pairs = mixup.draw_pairs(rng, ctx.config.batch_groups, 2 * len(label), method.pair_alpha)
    pairs = pairs._replace(share=jnp.maximum(pairs.share, 1 - pairs.share))
    weights = labelled.mean(0)
    return Supervision(
        example_weights=weights / jnp.maximum(weights.sum(), 1e-12),
        prepared=(target, labelled.astype(target.dtype), pairs),
        observed={"train/share_labelled": jnp.mean(labelled)},
    )


def sharpened(target: jax.Array, temperature: float) -> jax.Array:
    """t^(1/τ) divided by its sum."""
    return jax.nn.softmax(jnp.log(jnp.maximum(target, 1e-12)) / temperature)


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """The sum of both networks' losses; before the first division the mean CE of the standard view."""
    del rng
    target, labelled, pairs = supervision.prepared
    divided = (state.method["divided"] > 0).astype(target.dtype)

    def both_views(array):  # [B, ...] -> [2 B, ...], the views of an image one after the other
        return jnp.repeat(array, 2, axis=0)

    views = jnp.stack([batch["image"], batch["views"][:, 0]], 1).reshape(-1, *batch["image"].shape[1:])
    # Before the division the standard view twice, unmixed: so the shapes are the same.
    images = jnp.where(divided > 0, mixup.mix_pairs(pairs, views), both_views(batch["image"]))
    logits, batch_stats = ctx.forward(params, state.batch_stats, images)
    pool = jax.vmap(lambda one: mixup.mix_pairs(pairs, both_views(one)))(target)
    pool = jnp.where(divided > 0, pool, jax.vmap(both_views)(target))
    has = jax.vmap(both_views)(labelled)
    probabilities = jax.nn.softmax(logits)

    def mean_over(values, mask):
        return jnp.sum(jnp.sum(mask * values, -1) / jnp.maximum(jnp.sum(mask, -1), 1))

    epochs = state.step / ctx.steps_per_epoch - state.method["divided"]
    strength = ctx.config.method.unlabelled_strength * jnp.clip(epochs / RAMP_EPOCHS, 0, 1) * divided
    mean, uniform = probabilities.mean(1), 1 / ctx.num_classes
    balance = jnp.sum(uniform * jnp.log(uniform / jnp.maximum(mean, 1e-12)))
    terms = {
        "labelled": mean_over(losses.cross_entropy(logits, pool), has),
        "unlabelled": strength * mean_over(losses.squared_error(logits, pool), 1 - has),
        "balance": divided * balance,
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits.mean(0)[::2], batch_stats)


def on_epoch(ctx: Context, state, look):
    """The division: w by each network's losses, for the other one."""
    if look.epoch < ctx.config.method.divide_epochs:
        return state, None
    p = look.probabilities()[:, np.arange(len(look.labels)), look.labels]
    clean = np.stack([small_loss(-np.log(np.maximum(one, 1e-8))) for one in p], 1)
    first = int(look.memory()["divided"]) or look.epoch
    return state.replace(method={"clean": clean[:, ::-1].astype(np.float32), "divided": np.int32(max(first, 1))}), None


def small_loss(cross_entropy: np.ndarray) -> np.ndarray:
    """P(the normal distribution with the smaller mean | loss), `[N]`, of a mixture of two."""
    from sklearn.mixture import GaussianMixture  # takes a second, and all that reads flags comes by here

    low, high = cross_entropy.min(), cross_entropy.max()
    scaled = ((cross_entropy - low) / max(high - low, 1e-12))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
    return mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
