"""Supervised training on the trusted set alone, on strong views: what a few clean labels are worth by themselves."""

import jax

from ieg_jax.methods.base import Aux, Context, Supervision
from ieg_jax.methods.supervised import cross_entropy_loss, supervise

__all__ = ["NEEDS", "TRAINS_ON", "loss", "supervise"]

NEEDS = frozenset({"views"})
TRAINS_ON = "trusted"


def loss(context: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE(y, Φ(x̂)) over the first strong views of trusted images + weight decay."""
    del supervision, rng
    return cross_entropy_loss(context, params, state, batch["views"][:, 0], batch["label"])
