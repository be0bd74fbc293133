"""ω and λ of each training example, averaged over the last epochs of a run. `audit` reads them.

The sums are part of the training state, so that a resumed run ends with those of an undisturbed one.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ieg_jax.train.metrics import Examples


@flax.struct.dataclass
class Sums:
    """Sums over the steps that an example was part of; arrays `[n]`, the k-th of the example with id k."""

    weight: jax.Array  # float32: of ω · B, which is 1 where all examples of a batch weigh alike
    trust: jax.Array  # float32: of λ; methods that replace no label count as λ = 1
    visits: jax.Array  # int32: steps


def empty(num_ids: int) -> Sums:
    """Of `num_ids` examples, no step yet."""
    return Sums(jnp.zeros(num_ids), jnp.zeros(num_ids), jnp.zeros(num_ids, jnp.int32))


def add(sums: Sums, seen: Examples, counts: jax.Array) -> Sums:
    """Adds a step.

    Args:
      sums: of the steps before.
      seen: what the step found out, on every device: else XLA would rather add up the sums over the devices. An id may
        occur twice, where an epoch ends inside a batch.
      counts: bool scalar, whether the step is one of those that are averaged.
    """
    trust = jnp.ones_like(seen.weights) if seen.trust is None else seen.trust
    return Sums(
        weight=sums.weight.at[seen.ids].add(jnp.where(counts, seen.weights * seen.weights.size, 0).astype(jnp.float32)),
        trust=sums.trust.at[seen.ids].add(jnp.where(counts, trust, 0).astype(jnp.float32)),
        visits=sums.visits.at[seen.ids].add(counts.astype(jnp.int32)),
    )


def averages(sums: Sums) -> dict[str, np.ndarray]:
    """`weight`, `trust`: means over the visits, `[n]` float32, nan for an example that had none; `visits` `[n]` int32.

    Args:
      sums: on the host (`jax.device_get`).
    """
    with np.errstate(invalid="ignore"):
        means = {name: getattr(sums, name) / sums.visits.astype(np.float32) for name in ("weight", "trust")}
    return means | {"visits": sums.visits}
