"""INCV: iterative noisy cross-validation (Chen et al. 2019, PMLR 97), then Co-teaching on what it selects.

The training examples are divided into halves at random, and of two networks each learns one of them, so that each can
be asked of examples whose labels it has not seen. At the end of each of `selection_rounds` rounds of
`selection_epochs`:

    selected are the examples of which the other half's network predicts the given label
    ε, the share of wrong labels, is where (1 − ε)² + ε² / (K − 1) is the share that was selected (first round)
    discarded are in each half min(2, ε / (1 − ε)) times as many as were selected there, those with the largest losses

The selected examples are learned by both networks from then on, discarded ones by none, and what is left stays in its
half for the next round. After the last round both networks learn from the selected examples alone by Co-teaching
(`co_teaching`), which leaves out the share of wrong labels that is to be expected among them:

    τ = ε² / (ε² + (K − 1) (1 − ε)²), reached in `forget_epochs`

These are the formulas of uniform noise, for which the published code discards; for noise within pairs of classes it
does not (`discard=False`), and τ has 1 in place of K − 1, while ε stays as it is. Rounds, their length and
`forget_epochs` are published. There each round begins with new networks and new halves, and so does Co-teaching, which
after 40 epochs (80 within pairs or where ε > 0.6) takes in what was neither selected nor discarded; and an example is
judged by the network of that epoch of the round which was best on the other half. Here two networks go on, and so an
example stays in its half: no network is asked of what it has learned; and they judge as they are at the end of a round,
so that fewer `selection_epochs` are what keeps them from learning wrong labels. Predictions are the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, above, at_least, boolean
from ieg_jax.errors import UserError
from ieg_jax.methods import co_teaching
from ieg_jax.methods.base import MAIN, Context, Supervision
from ieg_jax.methods.co_teaching import loss as loss  # each network's, of the examples that are its
from ieg_jax.methods.parts import losses

TITLE = "INCV"
NETWORKS = 2
KEYS = {
    "selection_rounds": Key(4, at_least(1), "Rounds of cross-validation before Co-teaching."),
    "selection_epochs": Key(50.0, above(0), "Epochs of each of these."),
    "discard": Key(True, boolean, "Whether candidates with the largest losses are discarded: for uniform noise."),
    "forget_epochs": co_teaching.KEYS["forget_epochs"],
}
DISCARDED, SELECTED = -1, 2  # besides 0 and 1, the halves


def check(config) -> None:
    """Co-teaching has to begin before the run ends."""
    rounds, epochs = config.method.selection_rounds, config.method.selection_epochs
    if 0 < config.num_train_epochs <= rounds * epochs:
        raise UserError(
            f"method.selection_rounds={rounds} of method.selection_epochs={epochs:g} take {rounds * epochs:g} epochs, "
            f"and num_train_epochs={config.num_train_epochs:g}: set fewer, so that there is time for Co-teaching"
        )


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The part of each example, `[num_rows]`; rounds that are over, ε, and the epoch in which Co-teaching began."""
    return {
        "part": jax.random.permutation(rng, jnp.arange(num_rows, dtype=jnp.int32) % 2),
        "rounds": jnp.zeros((), jnp.int32),
        "noise": jnp.zeros(()),
        "began": jnp.zeros(()),
    }


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Which examples each network learns from: 1 or 0, `[2, B]`."""
    del rng
    method, memory = ctx.config.method, state.method
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    cross_entropy = losses.cross_entropy(logits, ctx.one_hot(batch["label"]))
    part = memory["part"][batch["row"]]
    own = (part == jnp.arange(2)[:, None]) | (part == SELECTED)
    epochs = state.step / ctx.steps_per_epoch - memory["began"]
    others = ctx.num_classes - 1 if method.discard else 1
    share = 1 - remaining_noise(memory["noise"], others) * jnp.clip(epochs / method.forget_epochs, 0, 1)
    easy = co_teaching.smallest(cross_entropy, share)[::-1]
    chosen = jnp.where(memory["rounds"] < method.selection_rounds, own, easy).astype(cross_entropy.dtype)
    weights = chosen.mean(0)
    return Supervision(
        example_weights=weights / jnp.maximum(weights.sum(), 1e-12),
        prepared=chosen,
        observed={"train/share_chosen": jnp.mean(chosen), "train/estimated_noise": memory["noise"]},
    )


def on_epoch(ctx: Context, state, look):
    """The selection, at the end of a round, and the rows that are learned from afterwards."""
    method, memory = ctx.config.method, look.memory()
    done = int(memory["rounds"])
    if done >= method.selection_rounds or look.epoch < (done + 1) * method.selection_epochs:
        return state, None
    noise = float(memory["noise"]) if done else None
    part, noise = selected(look.probabilities(), look.labels, memory["part"], noise, method.discard)
    rows = np.flatnonzero(part != DISCARDED)
    if done + 1 == method.selection_rounds and (part == SELECTED).any():
        rows = np.flatnonzero(part == SELECTED)
    memory = {"part": part, "rounds": np.int32(done + 1), "noise": np.float32(noise), "began": np.float32(look.epoch)}
    return state.replace(method=memory), {MAIN: rows}


def selected(
    probabilities: np.ndarray, labels: np.ndarray, part: np.ndarray, noise: float | None, discard: bool
) -> tuple[np.ndarray, float]:
    """A round's selection.

    Args:
      probabilities: `[2, N, K]`, of the network of each half.
      labels: `[N]`, as given.
      part: `[N]`: 0 or 1, the half of a candidate; SELECTED or DISCARDED.
      noise: ε, None = to be estimated.
      discard: whether examples are discarded.

    Returns:
      The parts afterwards `[N]`, and ε.
    """
    candidates = np.isin(part, (0, 1))
    unseen = np.where((part == 0)[:, None], probabilities[1], probabilities[0])  # by the other half's network
    right = candidates & (unseen.argmax(1) == labels)
    if noise is None:
        noise = estimated_noise(right.sum() / max(candidates.sum(), 1), probabilities.shape[-1])
    cross_entropy = -np.log(np.maximum(unseen[np.arange(len(labels)), labels], 1e-8))
    after = part.copy()
    for half in (0, 1) if discard else ():
        count = int(min(2, noise / (1 - noise)) * (right & (part == half)).sum())
        rows = np.flatnonzero(part == half)
        after[rows[np.argsort(-cross_entropy[rows], kind="stable")[:count]]] = DISCARDED
    after[right] = SELECTED
    return after, noise


def estimated_noise(share: float, num_classes: int) -> float:
    """ε in [0, 1 − 1/K] with (1 − ε)² + ε² / (K − 1) = `share`, as far as there is one."""
    most = 1 - 1 / num_classes
    return most * (1 - np.sqrt(max(1 - (1 - share) / most, 0.0)))


def remaining_noise(noise: jax.Array, others: int) -> jax.Array:
    """τ, the share of wrong labels to be expected among examples of which a prediction was the given label.

    Args:
      noise: ε.
      others: classes that a wrong label may name.
    """
    wrong = noise**2
    return wrong / (wrong + others * (1 - noise) ** 2)
