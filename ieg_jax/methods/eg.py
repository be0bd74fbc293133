"""EG: escalation and guidance, that is IEG without isolation (paper, section 3.4).

Semi-supervised: the trusted images have labels, all others have none. No ω, no λ, no lookahead; pseudo labels, mixup
and consistency as in `ieg`. EG* of the paper is EG with a larger network.
"""

import jax

from ieg_jax.methods import ieg
from ieg_jax.methods.base import Aux, Context, Supervision, total

NEEDS = frozenset({"views", "probe"})
TRAINS_ON = "noisy"


def supervise(context: Context, state, batch, rng) -> Supervision:
    """Pseudo labels and the mixed pool (Algorithm 1, lines 1, 2 and 5)."""
    _, pseudo_label = ieg.predict(context, state.params, state, batch)
    mixed_image, mixed_target = ieg.mixed_pool(context, batch, pseudo_label, rng)
    return Supervision(pseudo_label=pseudo_label, mixed_image=mixed_image, mixed_target=mixed_target)


def loss(context: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """L_p̂ + p·L_u + k·L_KL + weight decay."""
    del rng
    logits, batch_stats = context.forward(params, state.batch_stats, batch["image"])
    terms = ieg.guidance(context, params, state, batch, supervision, logits)
    terms["weight_decay"] = context.weight_decay(params)
    return total(terms), Aux(terms, logits, batch_stats)
