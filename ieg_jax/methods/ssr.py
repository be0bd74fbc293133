"""SSR: sample selection and relabelling (Feng et al. 2022, arXiv 2111.11288), without feature consistency (not SSR+).

At the end of each epoch the network sees the whole training set once:

    relabelling: y_i ← argmax Φ(x_i) where the largest probability is above θ_r, else the given label
    selection: of the k nearest neighbours of x_i (by the cosine of the features) a vote is made, each counting
        1 / the number of labels of its class; x_i is learned from where its own label has enough: c_i(y_i) ≥ θ_s

with c_i the vote divided by its largest, so that θ_s = 1 asks for the winner, as published. Training is with mixup of
pairs, δ ~ Beta(α, α), on the selected examples alone. For the first `warmup_epochs` all are learned from as given. In
the published code the selected examples are drawn so that their new labels are equally frequent;
`class_weight=balanced` does that here by the given labels. With k = N all examples vote: the most frequent label has
most votes, each class as many as it has labels, and so all are winners once these are counted by 1 / that number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, at_least, within
from ieg_jax.methods.base import MAIN, Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses, mixup

TITLE = "SSR"
KEYS = {
    "relabel_threshold": Key(0.9, within(0, 1), "θ_r: surer predictions replace labels; 1 = none."),
    "select_threshold": Key(1.0, within(0, 1), "θ_s: share of the winner's votes that an example's label needs."),
    "neighbours": Key(200, at_least(1), "k, nearest neighbours that vote."),
    "pair_alpha": mixup.PAIR_ALPHA,
    "warmup_epochs": Key(1.0, at_least(0), "Epochs on all examples with the labels as given."),
}
PAIRS_AT_ONCE = 2**25  # similarities, of a block of examples with all


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The label of each example that was relabelled, −1 = as given: `[num_rows]` int32."""
    del ctx, rng
    return {"label": jnp.full(num_rows, -1, jnp.int32)}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Labels `[B, K]`, partners and shares of the mixture."""
    changed = state.method["label"][batch["row"]]
    label = ctx.one_hot(jnp.where(changed < 0, batch["label"], changed))
    pairs = mixup.draw_pairs(rng, ctx.config.batch_groups, len(label), ctx.config.method.pair_alpha)
    return Supervision(prepared=(label, pairs), observed={"train/relabelled": jnp.mean(changed >= 0)})


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE of the mixture + weight decay."""
    del rng
    label, pairs = supervision.prepared
    logits, batch_stats = ctx.forward(params, state.batch_stats, mixup.mix_pairs(pairs, batch["image"]))
    terms = {
        "mixed": jnp.mean(losses.cross_entropy(logits, mixup.mix_pairs(pairs, label))),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)


def on_epoch(ctx: Context, state, look):
    """The labels from here on, and the rows that are learned from."""
    method = ctx.config.method
    if look.epoch < method.warmup_epochs:
        return state, None
    p = look.probabilities()[0]
    sure = p.max(1) > method.relabel_threshold
    label = np.where(sure, p.argmax(1), look.labels)
    vote = votes(look.features()[0], label, ctx.num_classes, method.neighbours)
    chosen = np.flatnonzero(vote[np.arange(len(label)), label] >= method.select_threshold)
    changed = np.where(sure & (label != look.labels), label, -1).astype(np.int32)
    # Where nothing is selected, all go on: a batch has to be made of something.
    return state.replace(method={"label": changed}), {MAIN: chosen if len(chosen) else np.arange(len(label))}


def votes(features: np.ndarray, label: np.ndarray, num_classes: int, neighbours: int) -> np.ndarray:
    """Votes of the nearest neighbours, divided by the winner's: `[N, K]` in [0, 1].

    The search is exact: N² D multiplications on a device, whose memory holds `[N, D]` and PAIRS_AT_ONCE float32.

    Args:
      features: `[N, D]`.
      label: `[N]`.
      num_classes: K.
      neighbours: k; more than N − 1 are all others and the example itself.
    """
    counts = counted(features, label, num_classes, neighbours)
    found = counts / np.maximum(np.bincount(label, minlength=num_classes), 1)  # equal ratios are equal numbers
    return found / found.max(1, keepdims=True)


def counted(features: np.ndarray, label: np.ndarray, num_classes: int, neighbours: int) -> np.ndarray:
    """How many of the nearest neighbours have each label: `[N, K]`; the arguments are those of `votes`."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    count = min(neighbours, len(unit))
    at_once = max(1, min(len(unit), PAIRS_AT_ONCE // len(unit)))
    everyone = jnp.asarray(unit, jnp.float32)
    found = np.empty((len(unit), num_classes))
    for start in range(0, len(unit), at_once):
        first = min(start, len(unit) - at_once)  # the last ones once more, so that all blocks have one shape
        near = label[np.asarray(_nearest(everyone, first, at_once, count))]
        cells = near + num_classes * np.arange(at_once)[:, None]
        counts = np.bincount(cells.ravel(), minlength=num_classes * at_once)
        found[first : first + at_once] = counts.reshape(at_once, num_classes)
    return found


@functools.partial(jax.jit, static_argnames=("at_once", "count"))
def _nearest(everyone: jax.Array, first: int, at_once: int, count: int) -> jax.Array:
    """Rows of the `count` most alike to each of `at_once` rows from `first` on, themselves among them."""
    some = jax.lax.dynamic_slice_in_dim(everyone, first, at_once)
    alike = jnp.matmul(some, everyone.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(alike, count)[1]
