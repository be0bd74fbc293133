"""M-correction (Arazo et al. 2019, arXiv 1904.11238): a mixture of losses says which labels to bootstrap, with mixup.

At the end of each epoch two beta distributions are fitted to the losses of all training examples
(`parts.mixtures.large_losses`); w_i is the probability that example i is of the one with large losses, a wrong label.
Images are mixed in pairs, x = δ x_a + (1 − δ) x_b with δ ~ Beta(α, α), and each side has the label as given or, with
w, the class that the network predicts (dynamic hard bootstrapping with mixup, "M-DYR-H"):

    L = mean δ [(1 − w_a) CE(y_a, x) + w_a CE(z_a, x)] + (1 − δ) [(1 − w_b) CE(y_b, x) + w_b CE(z_b, x)]
        + strength Σ_c π_c log(π_c / mean Φ_c) + weight decay

z is the argmax of this step's prediction for the unmixed image, π is uniform: the last term keeps the network from one
class (weight 1 there). For the first `bootstrap_epochs` w and the strength are 0, which is mixup. α = 32 there.

The published code bootstraps after 105 of 300 epochs, and computes w in each step, from the loss that the network has
then for the augmented image, by the mixture of the epoch before; here w is that of the end of the epoch, from the image
as it is, so that a step costs a forward pass less.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, above, at_least
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses, mixup
from ieg_jax.methods.parts.mixtures import large_losses

TITLE = "M-correction"
KEYS = {
    "bootstrap_epochs": Key(10.0, at_least(0), "Epochs of mixup on the given labels alone."),
    "bootstrap_alpha": Key(32.0, above(0), "α of the mixing of pairs: the larger, the nearer to halves."),
    "bootstrap_balance": Key(1.0, at_least(0), "Weight of the term against predicting few classes."),
}


def passes(config) -> float:
    """A forward pass for what is bootstrapped, and forward and backward over the mixture."""
    del config
    return 4.0


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """The probabilities w of all examples, 0 at first, `[num_rows]`; and 1 once they have been computed, else 0."""
    del ctx, rng
    return {"wrong": jnp.zeros(num_rows), "begun": jnp.zeros(())}


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Partners and shares of the mixture, and what is learned of each image: `[B, K]`."""
    logits, _ = ctx.forward(state.params, state.batch_stats, batch["image"])
    label = ctx.one_hot(batch["label"])
    wrong = state.method["wrong"][batch["row"]][:, None]
    target = (1 - wrong) * label + wrong * ctx.one_hot(jnp.argmax(logits, -1))
    pairs = mixup.draw_pairs(rng, ctx.config.batch_groups, len(label), ctx.config.method.bootstrap_alpha)
    return Supervision(prepared=(target, pairs), observed={"train/bootstrapped": jnp.mean(wrong)})


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """CE of the mixture + the term for balance + weight decay."""
    del rng
    target, pairs = supervision.prepared
    logits, batch_stats = ctx.forward(params, state.batch_stats, mixup.mix_pairs(pairs, batch["image"]))
    mean, uniform = jnp.mean(jax.nn.softmax(logits), 0), 1 / ctx.num_classes
    strength = ctx.config.method.bootstrap_balance * state.method["begun"]
    terms = {
        "mixed": jnp.mean(losses.cross_entropy(logits, mixup.mix_pairs(pairs, target))),
        "balance": strength * jnp.sum(uniform * jnp.log(uniform / jnp.maximum(mean, 1e-12))),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)


def on_epoch(ctx: Context, state, look):
    """The probabilities w of all examples, once `bootstrap_epochs` are over."""
    if look.epoch < ctx.config.method.bootstrap_epochs:
        return state, None
    p = look.probabilities()[0][np.arange(len(look.labels)), look.labels]
    wrong = large_losses(-np.log(np.maximum(p, 1e-8))).astype(np.float32)
    return state.replace(method={"wrong": wrong, "begun": np.float32(1)}), None
