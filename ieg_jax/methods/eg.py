"""EG: escalation and guidance, that is IEG without isolation (paper, section 3.4).

Semi-supervised: the trusted images have labels, all others have none. No ω, no λ, no lookahead; pseudo labels, mixup
and consistency as in `ieg`. EG* of the paper is EG with a larger network.
"""

import jax

from ieg_jax.methods import ieg
from ieg_jax.methods.base import Aux, Context, Supervision, total
from ieg_jax.methods.parts import mixup
from ieg_jax.methods.parts.pseudo_labels import NORMALIZE_LOGITS, TEMPERATURE

TITLE = "EG"
KEYS = {
    "temperature": TEMPERATURE,
    "unlabeled_weight": ieg.UNLABELED_WEIGHT,
    "consistency_weight": ieg.CONSISTENCY_WEIGHT,
    "normalize_logits": NORMALIZE_LOGITS,
    **mixup.KEYS,
}
STREAMS = ieg.STREAMS
check = mixup.check


def passes(config) -> float:
    """The views forward, the mixed pool forward and backward, and the views backward where they are compared."""
    views = config.augment.num_views - 1
    return 1 + views + 3 * (2 + views) + 2 * views * (config.method.consistency_weight > 0)


def supervise(ctx: Context, state, batch, rng) -> Supervision:
    """Pseudo labels and the mixed pool (Algorithm 1, lines 1, 2 and 5)."""
    _, pseudo_label = ieg.predict_views(ctx, state.params, state, batch)
    return Supervision(pseudo_label=pseudo_label, prepared=ieg.mixed_pool(ctx, batch, pseudo_label, rng))


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """L_p̂ + p·L_u + k·L_KL + weight decay."""
    del rng
    logits, batch_stats = ctx.forward(params, state.batch_stats, batch["image"])
    terms = ieg.guidance(ctx, params, state, batch, supervision, logits)
    terms["weight_decay"] = ctx.weight_decay(params)
    return total(terms), Aux(terms, logits, batch_stats)
