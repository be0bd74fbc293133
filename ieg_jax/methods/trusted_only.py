"""Supervised training on the trusted set alone, on strong views: what a few clean labels are worth by themselves."""

import jax

from ieg_jax.methods.base import ALL_VIEWS, TRUSTED, Aux, Context, Stream, Supervision
from ieg_jax.methods.supervised import cross_entropy_loss

TITLE = "trusted only"
STREAMS = {"main": Stream(TRUSTED, views=ALL_VIEWS)}


def loss(ctx: Context, params, state, batch, supervision: Supervision, rng) -> tuple[jax.Array, Aux]:
    """Mean CE(y, Φ(x̂)) over the first strong views of trusted images + weight decay."""
    del supervision, rng
    return cross_entropy_loss(ctx, params, state, batch["views"][:, 0], batch["label"])
