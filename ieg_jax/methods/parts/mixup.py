"""Mixup (Zhang et al. 2017) of a pool of trusted images, noisy images and their strong views.

The pool is laid out group by group, `[G, blocks · B/G, ...]` with the blocks (trusted, standard view, strong
views) in this order inside each group, so that with G a multiple of the number of devices no image leaves its
device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ieg_jax.config import Key, above, one_of
from ieg_jax.errors import UserError

KEYS = {
    "mixup_coefficient": Key(
        "approximate",
        one_of("approximate", "exact"),
        "How the coefficient of Beta(α, α) is drawn: approximate (U²/2, which stands for α = 1/2 alone) or exact.",
    ),
    "mixup_alpha": Key(0.5, above(0), "α; the smaller it is, the less is mixed."),
}


def check(config: ConfigDict) -> None:
    """Raises UserError for an α that the approximate coefficient does not stand for."""
    method = config.method
    if method.mixup_coefficient == "approximate" and method.mixup_alpha != 0.5:
        raise UserError(
            f"method.mixup_alpha: got {method.mixup_alpha!r}, but method.mixup_coefficient=approximate stands "
            f"for Beta(1/2, 1/2) alone; set method.mixup_coefficient=exact"
        )


class Draw(NamedTuple):
    """The random choices of one mixup: G groups, n = B/G examples in each, S = blocks · n pool elements."""

    probe_index: jax.Array  # [G, n] int32: place in the group's trusted images, with replacement
    partner: jax.Array  # [G, S] int32: a permutation of the group's pool
    coefficient: (
        jax.Array
    )  # [G, S] in [1/2, 1], float64 where jax has 64 bits: share of the element itself, the rest is its partner's


def draw(
    rng: jax.Array, groups: int, size: int, probe_size: int, blocks: int, coefficient: str, alpha: float = 0.5
) -> Draw:
    """Draws what one mixup needs (paper, equation 6).

    Args:
      rng: key.
      groups: G.
      size: n, noisy examples in a group.
      probe_size: trusted images in a group.
      blocks: 1 + V, blocks of n elements in a group's pool.
      coefficient: `exact`: β ~ Beta(α, α); `approximate`: β = U²/2 with U uniform on [0, 1], as the authors do, which
        stands for Beta(½, ½) alone. Either way max(β, 1 − β) is used, so that the result stays nearest to its first
        part.
      alpha: α of `exact`, above 0; ½ in the paper. The smaller, the nearer to the first part.
    """
    index_rng, partner_rng, coefficient_rng = jax.random.split(rng, 3)
    pool = blocks * size
    partner = jax.vmap(lambda key: jax.random.permutation(key, pool))(jax.random.split(partner_rng, groups))
    if coefficient == "exact":
        beta = jax.random.beta(coefficient_rng, alpha, alpha, (groups, pool))
    else:
        beta = jnp.square(jax.random.uniform(coefficient_rng, (groups, pool))) / 2
    return Draw(jax.random.randint(index_rng, (groups, size), 0, probe_size), partner, jnp.maximum(beta, 1 - beta))


def resample(draw: Draw, probe: jax.Array) -> jax.Array:
    """Picks the trusted images (or labels) of the pool: `[Bp, ...]` -> `[B, ...]`, inside each group."""
    groups = draw.probe_index.shape[0]
    grouped = probe.reshape(groups, -1, *probe.shape[1:])
    picked = jax.vmap(lambda block, index: block[index])(grouped, draw.probe_index)
    return picked.reshape(-1, *probe.shape[1:])


def mix(draw: Draw, blocks: list[jax.Array]) -> jax.Array:
    """Mixes each element of the pool with its partner.

    Args:
      draw: the random choices.
      blocks: the parts of the pool, arrays `[B, ...]` of equal shape.

    Returns:
      `[blocks · B, ...]`, group by group; `split` takes it apart. Its type is the better one of the blocks' and the
      coefficients': in checks with 64 bits, images in 32 are mixed with 64.
    """
    groups = draw.partner.shape[0]
    pool = jnp.concatenate([block.reshape(groups, -1, *block.shape[1:]) for block in blocks], axis=1)
    partner = jax.vmap(lambda elements, index: elements[index])(pool, draw.partner)
    beta = draw.coefficient.reshape(*draw.coefficient.shape, *([1] * (pool.ndim - 2)))
    return (beta * pool + (1 - beta) * partner).reshape(-1, *pool.shape[2:])


def split(pool: jax.Array, groups: int, blocks: int) -> list[jax.Array]:
    """Takes `[blocks · B, ...]` apart into `blocks` arrays `[B, ...]`: the inverse of the layout of `mix`."""
    parts = pool.reshape(groups, blocks, -1, *pool.shape[1:])
    return [parts[:, block].reshape(-1, *pool.shape[1:]) for block in range(blocks)]


PAIR_ALPHA = Key(4.0, above(0), "α of the mixing of pairs.")


class Pairs(NamedTuple):
    """The random choices of an ordinary mixup of a batch with itself (Zhang et al. 2018)."""

    partner: jax.Array  # [G, n] int32: a permutation of each group
    share: jax.Array  # scalar: of the element itself, one for the whole batch


def draw_pairs(rng: jax.Array, groups: int, size: int, alpha: float) -> Pairs:
    """Draws partners inside each of `groups` groups of a batch of `size`, and the share from Beta(α, α)."""
    partner_rng, share_rng = jax.random.split(rng)
    keys = jax.random.split(partner_rng, groups)
    partner = jax.vmap(lambda key: jax.random.permutation(key, size // groups))(keys)
    return Pairs(partner, jax.random.beta(share_rng, alpha, alpha))


def mix_pairs(pairs: Pairs, array: jax.Array) -> jax.Array:
    """Each element of a batch `[B, ...]` mixed with its partner."""
    grouped = array.reshape(*pairs.partner.shape, *array.shape[1:])
    partner = jax.vmap(lambda part, place: part[place])(grouped, pairs.partner).reshape(array.shape)
    return pairs.share * array + (1 - pairs.share) * partner
