"""The end of an epoch: what a method sees of the training set then, and what it makes of it.

Only a method with `on_epoch` has such ends. There it may look at the predictions for the whole training set, change
what it remembers, and choose which rows each of its streams draws from until the next end. What it chose is part of the
state, so that a resumed run draws what an undisturbed one would.

A method with `fit` sees the training set before each evaluation too, by the weights that are evaluated.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ieg_jax.data.batches import EvalBatches
from ieg_jax.data.splits import Split
from ieg_jax.errors import UserError
from ieg_jax.runtime.mesh import Shardings
from ieg_jax.train.program import Program
from ieg_jax.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class Look:
    """The training set as the networks see it at the end of an epoch. Everything is by row.

    Attributes:
      labels: `[N]` int32, as given.
      epoch: epochs that are over.
      is_last: whether this is the end of the run.
      seed: for random choices on the host; another one at each epoch, the same on every process.
    """

    labels: np.ndarray
    epoch: int
    is_last: bool
    seed: int
    _batches: Callable[[], Iterable[dict[str, jax.Array]]]
    _program: Program
    _state: TrainState

    def probabilities(self) -> np.ndarray:
        """softmax(Φ(x)) of each of the R networks, without augmentation: `[R, N, K]` float32."""
        return self._predict(self._program.probabilities)

    def memory(self) -> Any:
        """What the method remembers, on the host; of an array by example the N rows."""
        whole = jax.jit(lambda memory: memory, out_shardings=self._program.rng.sharding)(self._state.method)
        count, padded = len(self.labels), self._program.num_rows
        return jax.tree.map(
            lambda leaf: np.array(leaf[:count] if leaf.ndim and len(leaf) == padded else leaf), jax.device_get(whole)
        )

    def features(self) -> np.ndarray:
        """What goes into the last layer of each network: `[R, N, D]` float32."""
        return self._predict(self._program.features)

    def by(self, params: Any) -> "Look":
        """The same by other weights."""
        return dataclasses.replace(self, _state=self._state.replace(params=params))

    def averaged(self) -> "Look":
        """The same by the averaged weights, where the run has them."""
        return self if self._state.ema_params is None else self.by(self._state.ema_params)

    def _predict(self, function: Callable) -> np.ndarray:
        variables = self._state.params, self._state.batch_stats
        parts = [np.asarray(function(*variables, batch["image"])) for batch in self._batches()]
        return np.concatenate(parts, 1)[:, : len(self.labels)]  # the padding is at the end


def at(
    config: ConfigDict,
    train: Split,
    shardings: Shardings,
    program: Program,
    state: TrainState,
    epoch: int,
    is_last: bool,
) -> Look:
    """A look at the training set.

    Args:
      config: of the run.
      train: the noisy training set.
      shardings: on the devices.
      program: of the run.
      state: after a step.
      epoch: epochs that are over then.
      is_last: whether this is the end of the run.
    """
    seed = (config.seed * 1_000_003 + epoch) % 2**31
    batches = functools.partial(EvalBatches, config, train, shardings.batch)
    return Look(train.labels, epoch, is_last, seed, batches, program, state)


def finish_epoch(seen: Look) -> TrainState:
    """Calls the method's `on_epoch`; returns the state with what it remembers and which rows it chose.

    Raises:
      UserError: where the method returns a memory of other shapes, or rows that do not exist.
    """
    program, state = seen._program, seen._state
    changed, rows = program.method.on_epoch(state, seen)
    memory = jax.tree.map(_fitted, changed.method, program.state.method)
    masks = {name: np.asarray(mask) for name, mask in jax.device_get(state.rows).items()}
    for name, chosen in (rows or {}).items():
        if name not in masks:
            raise UserError(f"method.name={program.method.name} chose rows of {name}, expected {', '.join(masks)}")
        chosen = np.asarray(chosen, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(masks[name]):
            raise UserError(
                f"method.name={program.method.name} chose rows of {name} outside 0 to {len(masks[name]) - 1}"
            )
        masks[name] = np.zeros_like(masks[name])
        masks[name][chosen] = True
    masks = {name: jax.device_put(mask, program.state.rows[name].sharding) for name, mask in masks.items()}
    return changed.replace(method=memory, rows=masks)


def fit(seen: Look) -> tuple[Any, Any]:
    """What the method remembers for the evaluation of the averaged and of the raw weights, see its `fit`."""
    program, state = seen._program, seen._state
    if not program.method.fit:
        return state.method, state.method
    raw, averaged = (
        None if params is None else jax.tree.map(_fitted, program.method.fit(seen.by(params)), program.state.method)
        for params in (state.params, state.ema_params)
    )
    return raw if averaged is None else averaged, raw


def chosen_rows(state: TrainState) -> dict[str, np.ndarray]:
    """Stream -> the rows that it draws from, increasing; {} for a method that does not choose."""
    return {name: np.flatnonzero(mask) for name, mask in jax.device_get(state.rows).items()}


def _fitted(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of the method on the devices; one of N rows gets the rows behind them, which nothing reads."""
    if isinstance(leaf, jax.Array) and leaf.shape == like.shape:
        return leaf
    array = np.asarray(leaf, like.dtype)
    if array.ndim and array.shape[1:] == like.shape[1:] and len(array) < like.shape[0]:
        padding = np.zeros((like.shape[0] - len(array), *array.shape[1:]), array.dtype)
        array = np.concatenate([array, padding])
    if array.shape != like.shape:
        raise UserError(f"the method returned an array {array.shape} for one of {like.shape} that the method remembers")
    return jax.device_put(array, like.sharding)
