"""Forward correction (Patrini et al. 2017, arXiv 1609.03683): the loss of what the labels would be after the noise.

T holds how labels go wrong, T_ij = P(given = j | true = i). The network's probabilities go through it before they are
compared with the given label, so that Φ itself is drawn to the true one:

    L = mean_i −log Σ_k Φ_k(x_i) T_{k y_i} + weight decay

T is estimated from anchors: after E epochs of plain training, T_ij = Φ_j(x^i) with x^i the training example that the
network takes for class i more surely than the share `anchor_quantile` of all (the surest one in the paper; in the
published code the 97th percentile, and for CIFAR-100 the surest one). With more than ten classes as many as ten would
have are surer: of K = 100 classes the 97th percentile would be of another class. Until then T is the identity, with
which this is the cross-entropy. The published runs estimate T with a network of its own and train another from the
beginning; here one network goes on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.config import Key, above, within
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import losses

TITLE = "Forward correction"
KEYS = {
    "transition_epochs": Key(10.0, above(0), "E, epochs of plain training before T is estimated."),
    "anchor_quantile": Key(
        0.97,
        within(0, 1),
        "Which of the examples, by the probability of a class, is its anchor; of up to ten classes.",
    ),
}


def init(ctx: Context, rng, num_rows: int) -> dict[str, jax.Array]:
    """T, the identity at first: `[K, K]`."""
    del rng, num_rows
    return {"transition": jnp.eye(ctx.num_classes), "estimated": jnp.zeros((), jnp.int32)}


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean cross-entropy of Φ T + weight decay."""
    del supervision, rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    corrected = losses.corrected(logits, ctx.one_hot(batch["label"]), state.method["transition"])
    terms = {
        "corrected_cross_entropy": jnp.mean(corrected),
        "weight_decay": ctx.weight_decay(params),
    }
    return total(terms), Aux(terms, logits, batch_stats)


def on_epoch(ctx: Context, state, look):
    """T from the anchors, once `transition_epochs` are over."""
    method = ctx.config.method
    if look.epoch < method.transition_epochs or look.memory()["estimated"]:
        return state, None
    memory = {"transition": anchored(look.probabilities()[0], method.anchor_quantile), "estimated": np.int32(1)}
    return state.replace(method=memory), None


def anchored(probabilities: np.ndarray, quantile: float) -> np.ndarray:
    """T `[K, K]` from the predictions `[N, K]` for the training set."""
    surer = (1 - quantile) * min(1, 10 / probabilities.shape[1])
    place = round((1 - surer) * (len(probabilities) - 1))
    anchors = np.argsort(probabilities, axis=0, kind="stable")[place]
    transition = probabilities[anchors].astype(np.float64)
    return transition / transition.sum(1, keepdims=True)
