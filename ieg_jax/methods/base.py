"""What every method is made of.

A method is a module with two pure functions and a note of what it needs:

    NEEDS: frozenset of "views", "probe": parts of the batch besides image and label
    TRAINS_ON: "noisy" or "trusted": the set that batches are drawn from
    supervise(context, state, batch, rng) -> Supervision      nothing that a gradient flows through
    loss(context, params, state, batch, supervision, rng) -> (scalar, Aux)

and optionally, for work per epoch or memory per example, kept in `state.method_state`:

    init_state(context, num_examples) -> pytree of arrays
    on_epoch_end(context, state) -> state
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ieg_jax import losses, optimizers


class Supervision(NamedTuple):
    """What a step trains on: computed before the loss, without gradient. Parts a method lacks are None."""

    pseudo_label: jax.Array | None = None  # g, [B, K]
    example_weights: jax.Array | None = None  # ω*, [B]
    label_trust: jax.Array | None = None  # λ*, [B]
    mixed_image: jax.Array | None = None  # [(1 + V) B, H, W, C], see mixup.py
    mixed_target: jax.Array | None = None  # [(1 + V) B, K]
    probe_loss: jax.Array | None = None  # trusted loss after the lookahead, scalar


class Aux(NamedTuple):
    """What the loss hands on besides its value."""

    terms: dict[str, jax.Array]  # the parts of the loss as they enter it, scalars
    logits: jax.Array  # [B, K] of the standard view
    batch_stats: Any  # new moving averages


@dataclasses.dataclass(frozen=True)
class Context:
    """The static parts of a run that a method works with."""

    config: FrozenConfigDict
    network: nn.Module
    optimizer: optax.GradientTransformation
    num_classes: int

    def forward(self, params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """Training-mode forward pass: images `[n, H, W, C]` -> logits `[n, K]`, new moving averages.

        With `microbatches` m above 1 the images go through the network in m parts, one after the other, and only the
        activations of one part are in memory: the backward pass computes them anew, part by part, and adds up the
        gradients. A part is a whole number of batch groups, and everything that mixes examples does so inside a
        group. So the logits, and with them every loss, ω, λ and the meta-gradient, are those of m = 1.
        """

        def apply(part):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = self.network.apply(variables, part, train=True, mutable=["batch_stats"])
            return logits, updated["batch_stats"]

        count = self.config.microbatches
        if count == 1:
            return apply(images)
        # Each part takes every count-th group: with a multiple of count groups on each device it lies on all of them.
        groups = self.config.batch_groups // count
        parts = images.reshape(groups, count, -1, *images.shape[1:]).swapaxes(0, 1)
        parts = parts.reshape(count, -1, *images.shape[1:])
        logits, stats = jax.lax.map(jax.checkpoint(apply, prevent_cse=False), parts)
        logits = logits.reshape(count, groups, -1, logits.shape[-1]).swapaxes(0, 1)
        # The moving averages take the mean over the groups; that of the parts' means is the same.
        return logits.reshape(images.shape[0], -1), jax.tree.map(lambda stat: stat.mean(0), stats)

    def one_hot(self, labels: jax.Array) -> jax.Array:
        """Labels `[B]` -> `[B, K]` of floats."""
        return jax.nn.one_hot(labels, self.num_classes, dtype=jnp.promote_types(jnp.float32, self.network.param_dtype))

    def weight_decay(self, params: Any) -> jax.Array:
        """The weight decay term of every loss, a scalar; 0 where the optimiser decays the weights (`adamw`)."""
        optimizer = self.config.optimizer
        return losses.weight_decay(params, optimizers.decay_in_loss(optimizer), optimizer.weight_decay_on)


def trusted_loss(context: Context, params: Any, state: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """L_p: mean CE(y_p, Φ(x_p)) over the probe batch, a scalar; with the weight decay term where `meta` says so."""
    logits, _ = context.forward(params, state.batch_stats, batch["probe_image"])
    loss = jnp.mean(losses.cross_entropy(logits, context.one_hot(batch["probe_label"])))
    return loss + context.weight_decay(params) if context.config.meta.weight_decay else loss


def total(terms: dict[str, jax.Array]) -> jax.Array:
    """The sum of the terms of a loss."""
    return sum(terms.values())


@dataclasses.dataclass(frozen=True)
class Method:
    """The functions of a method, bound to a context."""

    supervise: Callable[..., Supervision]
    loss: Callable[..., tuple[jax.Array, Aux]]
    init_state: Callable[[int], Any]
    on_epoch_end: Callable[[Any], Any] | None


def bind(module: ModuleType, context: Context) -> Method:
    """Binds the functions of a method's module to a context."""
    init_state = getattr(module, "init_state", lambda context, num_examples: {})
    on_epoch_end = getattr(module, "on_epoch_end", None)
    return Method(
        supervise=functools.partial(module.supervise, context),
        loss=functools.partial(module.loss, context),
        init_state=functools.partial(init_state, context),
        on_epoch_end=on_epoch_end and functools.partial(on_epoch_end, context),
    )
