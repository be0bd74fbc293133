"""What a run remembers of each training example: ω and λ over its last epochs. `audit` reads it.

It is part of the training state, so that a resumed run remembers what an undisturbed one would.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Memory:
    """Sums over the steps that an example was part of; arrays `[n]`, the k-th of the example with id k."""

    weight: jax.Array  # float32: of ω · B, which is 1 where all examples of a batch weigh alike
    trust: jax.Array  # float32: of λ; methods that replace no label count as λ = 1
    visits: jax.Array  # int32: steps


def empty(num_ids: int) -> Memory:
    """Of `num_ids` examples, no step yet."""
    return Memory(jnp.zeros(num_ids), jnp.zeros(num_ids), jnp.zeros(num_ids, jnp.int32))


def add(memory: Memory, ids: jax.Array, weights: jax.Array, trust: jax.Array | None, counts: jax.Array) -> Memory:
    """Adds a step.

    Args:
      memory: of the steps before.
      ids: `[B]` int32; one may occur twice, where an epoch ends inside a batch.
      weights: ω*, `[B]`.
      trust: λ*, `[B]`, or None.
      counts: bool scalar, whether the step is one of those that are remembered.
    """
    trust = jnp.ones_like(weights) if trust is None else trust
    return Memory(
        weight=memory.weight.at[ids].add(jnp.where(counts, weights * weights.size, 0).astype(jnp.float32)),
        trust=memory.trust.at[ids].add(jnp.where(counts, trust, 0).astype(jnp.float32)),
        visits=memory.visits.at[ids].add(counts.astype(jnp.int32)),
    )


def averages(memory: Memory) -> dict[str, np.ndarray]:
    """`weight`, `trust`: means over the visits, `[n]` float32, nan for an example that had none; `visits` `[n]` int32.

    Args:
      memory: on the host (`jax.device_get`).
    """
    with np.errstate(invalid="ignore"):
        means = {name: getattr(memory, name) / memory.visits.astype(np.float32) for name in ("weight", "trust")}
    return means | {"visits": memory.visits}
