"""FSR: fast sample reweighting without reward data (Zhang and Pfister 2021, arXiv 2109.03216).

As in IEG and L2R the weight of an example is how much it helps a reward set one step ahead, and here this costs next to
nothing and needs no trusted label. The lookahead moves the head alone, whose features are there already. The reward set
is chosen anew at the end of each epoch, from the training examples with their given labels: of each class those with
the smallest losses when they were last trained on, or (`reward_by=margin`) with the largest margins.

    Θ′(ω) = one optimiser update of the `lookahead_layers` on Σ_i ω_i CE(y_i, Φ(x_i)) + weight decay, at ω⁰ = 1/B
    L_r = mean CE(y_r, Φ(x_r; Θ′)) over a batch of the reward set, whose classes take turns
    ω*_i = max(−∂L_r/∂ω_i, 0) / (Σ + 10⁻⁵);   1/B in the first `reweight_epochs`
    margin_i = CE(y_i, Φ(x_i; Θ)) − CE(y_i, Φ(x_i; Θ′(ω⁰)))

With `lookahead_layers=.*`, a reward set of trusted images, ω⁰ = 0 and no momentum these are the weights of L2R.

The paper chooses by the margin. In the published code, which trains on mixtures of two images, its first loss is that
of the mixture and its second that of the image, so that the margin is large where the loss is small. Without mixtures
it is large where an example moves the head most towards its own label, which wrong labels do: on digits with 40 % of
uniform noise a reward set by margin had 31 % of right labels, of all examples 63 %. Hence the loss is the default here.

Sizes and epochs are the published ones for CIFAR (a reward set of 2,000, weights from epoch 20 on). The published runs
also train on mixtures and by a loss of pseudo labels (predictions averaged over the epochs), neither of which is here,
and draw twice as many reward images as noisy ones in a step. That a class gives at most half of its examples to the
reward set is for small data.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, at_least, one_of
from ieg_jax.methods.base import MAIN, NOISY, Aux, Context, Stream, Supervision, trusted_loss, weighted_loss
from ieg_jax.methods.parts import lookahead, losses

TITLE = "FSR"
REWARD = "reward"
STREAMS = {MAIN: Stream(), REWARD: Stream(NOISY, balanced=True)}
KEYS = {
    **{name: key for name, key in lookahead.KEYS.items() if name != "meta.layers"},
    "lookahead_layers": Key(
        "^head/", lookahead.KEYS["meta.layers"].check, "Regular expression: the parameters that the lookahead moves."
    ),
    "reward_size": Key(2000, at_least(1), "Examples in the reward set, over all classes."),
    "reward_by": Key(
        "loss", one_of("loss", "margin"), "How they are chosen: by the smallest loss or the largest margin."
    ),
    "reweight_epochs": Key(20.0, at_least(0), "Epochs in which all examples count alike."),
}


def passes(config) -> float:
    """The head alone: noisy images forward and backward, reward images forward. Else as L2R, and 1 for the margin."""
    if config.method.lookahead_layers == KEYS["lookahead_layers"].default:
        return 4.0
    return 10.0 + (config.method.reward_by == "margin")


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The score of each example when it was last trained on, −∞ = not yet: `[num_rows]`."""
    del ctx, rng
    return {"score": jnp.full(num_rows, -jnp.inf)}


def reward_gradient(ctx: Context, state, batch, weights: jax.Array, opt_state):
    """L_r after the lookahead, ∂L_r/∂ω at ω = `weights` `[B]`, and Θ′(ω)."""
    label, layers = ctx.one_hot(batch["label"]), ctx.config.method.lookahead_layers
    rate = ctx.config.meta.learning_rate
    reward = {"probe_image": batch["reward_image"], "probe_label": batch["reward_label"]}

    def noisy_loss(params, weights):
        logits, _ = ctx.forward(params, state.batch_stats, batch["image"])
        return jnp.sum(weights * losses.cross_entropy(logits, label)) + ctx.weight_decay(params)

    loss_after, gradient = lookahead.meta_gradient(
        noisy_loss,
        lambda params: trusted_loss(ctx, params, state, reward),
        weights,
        state.params,
        opt_state,
        ctx.optimizer,
        rate,
        layers,
    )
    after = lookahead.lookahead(
        lambda params: noisy_loss(params, weights), state.params, opt_state, ctx.optimizer, rate, layers
    )
    return loss_after, gradient, after


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Example weights ω*, and the scores of the batch: the margins, or the losses with a minus."""
    del rng
    method, label = ctx.config.method, ctx.one_hot(batch["label"])
    lookahead.check_layers(method.lookahead_layers, state.params, "method.lookahead_layers")
    uniform = jnp.full(len(label), 1 / len(label), label.dtype)
    loss_after, gradient, after = reward_gradient(ctx, state, batch, uniform, state.opt_state)

    def cross_entropy(params):
        return losses.cross_entropy(ctx.forward(params, state.batch_stats, batch["image"])[0], label)

    score = -cross_entropy(state.params)
    if method.reward_by == "margin":
        score = cross_entropy(state.params) - cross_entropy(after)
    begun = state.step >= method.reweight_epochs * ctx.steps_per_epoch
    return Supervision(
        example_weights=jnp.where(begun, lookahead.example_weights(gradient), uniform),
        memory={"score": ctx.write_rows(state.method["score"], batch["row"], score)},
        observed={"loss/reward_after_lookahead": loss_after},
    )


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Σ_i ω*_i CE(y_i, Φ(x_i)) + weight decay."""
    del rng
    return weighted_loss(ctx, params, state, batch, supervision.example_weights)


def on_epoch(ctx: Context, state, look):
    """The reward set until the next end of an epoch."""
    count = -(-ctx.config.method.reward_size // ctx.num_classes)
    return state, {REWARD: best_of_each(look.memory()["score"], look.labels, count)}


def best_of_each(score: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Rows with the highest scores `[N]` of each class, `count` of each and at most half of it."""
    chosen = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        chosen.append(rows[np.argsort(-score[rows], kind="stable")[: min(count, -(-len(rows) // 2))]])
    return np.sort(np.concatenate(chosen))
