"""Saves and restores checkpoints with Orbax, a library that writes them asynchronously and atomically."""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from ieg_jax import config as config_lib
from ieg_jax import files
from ieg_jax.config import at_least, one_of
from ieg_jax.errors import StorageError, UserError, first_line
from ieg_jax.runtime import processes
from ieg_jax.runtime.workdir import rank, saved_steps

RETRY_SECONDS = (1.0, 3.0, 10.0)  # waited for a storage that fails
PASSING = {getattr(errno, name) for name in ("EIO", "EAGAIN", "EINTR", "ESTALE", "ETIMEDOUT", "ENETDOWN", "ENETUNREACH",
                                             "EHOSTUNREACH", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED")}  # fmt: skip
# Libraries that read through C++ raise errors of other types, which bear the system's words or a status of gRPC.
PASSING_TEXTS = (*map(os.strerror, sorted(PASSING)), "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


def validate(checkpoint: ConfigDict) -> None:
    """Raises UserError for a value in the group `checkpoint` of the configuration that is not allowed."""
    checks = {
        "keep": at_least(1),
        "keep_every_steps": at_least(0, "0 or a number of steps"),
        "keep_best": at_least(0, "0 or a number of checkpoints"),
        "best_mode": one_of("max", "min"),
    }
    config_lib.check_values(checkpoint, checks, "checkpoint.")


class Checkpoints:
    """The folder `checkpoints/` of a work folder, with a subfolder for each checkpoint, named by its step.

    A checkpoint has a checksum of each of its arrays, so that any damage after it was written is noticed when it is
    restored. Damaged checkpoints are moved to `damaged_checkpoints/` and never deleted.
    """

    def __init__(self, folder: epath.PathLike, checkpoint: ConfigDict, reported: int | None = None):
        """Opens the folder, and makes it where it is missing.

        Args:
          folder: the folder `checkpoints/`, local or on a bucket.
          checkpoint: the group `checkpoint` of the configuration.
          reported: a step whose checkpoint is kept whatever comes after it.
        """
        self.folder = files.absolute(folder)
        self._best = _Best(checkpoint.keep_best, checkpoint.best_metric, 1 if checkpoint.best_mode == "max" else -1)
        policies = [policy.LatestN(checkpoint.keep), self._best, policy.CustomSteps([reported or 0])]
        if checkpoint.keep_every_steps:
            policies.append(policy.EveryNSteps(checkpoint.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        # Orbax can say what is in a checkpoint before anything was saved or restored only if it is told the handlers.
        handlers = {"tree": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        self._checksums = jax.jit(checksums)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def note_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Takes note of metrics, by which the best checkpoints are kept; `rows` are rows of metrics.jsonl."""
        self._best.note(rows)

    def save(self, step: int, tree: Any, position: int) -> None:
        """Starts to save a tree of arrays. They are copied before this returns, and written in the background.

        Args:
          step: updates made so far. Where the newest checkpoint is that of this step, nothing is saved.
          tree: the arrays, such as the train state and the window of metrics.
          position: noisy examples seen so far; there the data go on.

        Raises:
          StorageError: where this checkpoint, or the one before it, cannot be written.
        """
        if step == self._manager.latest_step():
            return
        sums = {name: int(value) for name, value in jax.device_get(self._checksums(tree)).items()}
        with self._storage_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    tree=ocp.args.StandardSave(tree),
                    data=ocp.args.JsonSave({"position": position, "checksums": sums}),
                ),
            )

    def restore_newest(self, like: Any, warn: Callable[[str], None]) -> tuple[int, Any, int] | None:
        """Restores the newest checkpoint that is not damaged. Newer ones, which are damaged, are moved out of the way.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings of the result. The
            checkpoint may have been saved with another number of devices.
          warn: is called with a line about each damaged checkpoint.

        Returns:
          Step, tree and position (see `save`); None where nothing has been saved yet.

        Raises:
          UserError: where the checkpoints hold another tree, such as that of another model.
          StorageError: where all checkpoints are damaged, and where one cannot be read now, which may pass.
        """
        found = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        mismatch, several = None, jax.process_count() > 1

        def read(step):
            self._check_tree(step, like)
            return self._read_alone(step) if several else self._restore(step, like)

        for step in found:
            damage, unreadable, restored = "", "", None
            try:
                restored = _patiently(lambda step=step: read(step))
            except UserError as error:
                # It is of another model, or its list of arrays is damaged. If an older one fits, it is the latter.
                mismatch, damage = error, "its arrays are not those of this model"
            except _Unreadable as error:
                unreadable = str(error)
            except Exception as error:  # damaged files make the library raise errors of any kind
                damage = first_line(error)
            unreadable = next(filter(None, processes.exchange(unreadable)), "")
            if unreadable:
                raise StorageError(
                    f"{self.folder / str(step)} cannot be read now: {unreadable}. Nothing says that it is damaged, and "
                    f"nothing was moved; bring the storage back, and give the same command again"
                )
            # All processes must take the same checkpoint, so what is damaged for one is damaged for all.
            damage = next(filter(None, processes.exchange(damage)), "")
            if not damage:
                restored = restored or self._restore(step, like)
                for other, reason in damaged.items():
                    warn(f"the checkpoint at step {other} is damaged and is not used ({reason})")
                    self._set_aside(other)
                return step, *restored
            damaged[step] = damage
        if mismatch:
            raise mismatch
        if damaged:
            newest = max(damaged)
            raise StorageError(
                f"all {len(found)} checkpoints of {self.folder} are damaged (step {newest}: {damaged[newest]}); "
                f"restore one from a copy, or begin again in another work folder"
            )
        return None

    def wait(self) -> None:
        """Waits until what was saved is written; raises StorageError where it cannot be written."""
        with self._storage_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits like `wait`, and then ends the background threads."""
        with self._storage_errors():
            self._manager.close()

    @property
    def _damaged(self) -> epath.Path:
        """The folder to which damaged checkpoints are moved."""
        return self.folder.parent / "damaged_checkpoints"

    def _check_tree(self, step: int, like: Any) -> None:
        """Raises UserError where a checkpoint has other arrays than `like`, ValueError where it does not say which."""
        saved, wanted = _shapes(self._manager.item_metadata(step)["tree"]), _shapes(like)
        if not saved:
            raise ValueError("its list of arrays cannot be read")
        if saved != wanted:
            names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
            shown = "\n".join(
                f"  {name}: {saved.get(name, 'absent')} -> {wanted.get(name, 'absent')}" for name in names[:5]
            )
            raise UserError(
                f"{self.folder / str(step)} is the checkpoint of another model or method: {len(names)} arrays "
                f"differ (checkpoint -> configuration):\n{shown}\nuse another work folder, or the configuration "
                f"it was written with"
            )

    def _restore(self, step: int, like: Any) -> tuple[Any, int]:
        """Returns tree and position of a checkpoint; all processes take part. Raises where it is damaged."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        )
        tree, data = restored["tree"], restored["data"]
        _check_sums(tree, data["checksums"], self._checksums)
        return tree, data["position"]

    def _read_alone(self, step: int) -> None:
        """Reads a whole checkpoint on process 0, and raises there where it is damaged. Other processes do nothing.

        This precedes restoring it together, in which processes wait for each other: if one failed, the others would
          wait
        for ever.
        """
        if jax.process_index():
            return
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        handlers = {
            "tree": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
            "data": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        with ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers) as manager:
            saved = manager.item_metadata(step)["tree"].tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            restore = ocp.args.Composite(
                tree=ocp.args.PyTreeRestore(restore_args=as_numpy), data=ocp.args.JsonRestore()
            )
            found = manager.restore(step, args=restore)
        _check_sums(found["tree"], found["data"]["checksums"], jax.jit(checksums))

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint to `damaged_checkpoints/`."""
        self._damaged.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            target, number = self._damaged / str(step), 1
            while target.exists():
                target, number = self._damaged / f"{step}-{number}", number + 1
            (self.folder / str(step)).rename(target)
        processes.exchange("moved")  # all processes wait here until it is moved, and then list the checkpoints again
        self._manager.reload()

    @contextlib.contextmanager
    def _storage_errors(self):
        """Turns every error into a StorageError that names the last good checkpoint."""
        try:
            yield
        except Exception as error:
            raise StorageError(
                f"a checkpoint cannot be written to {self.folder}: {first_line(error)}; {self.newest()}. Make room, or "
                f"bring the storage back, and give the same command again"
            ) from error

    def newest(self) -> str:
        """Says in words from which checkpoint the run can go on; it lists the folder for this."""
        try:
            last = max(saved_steps(self.folder), default=None)
        except files.storage_errors() as error:
            return f"the checkpoints cannot be listed now ({first_line(error)})"
        return f"the last good checkpoint is {self.folder / str(last)}" if last else "there is no checkpoint yet"


class _Unreadable(Exception):
    """A checkpoint cannot be read, and this says nothing about whether it is damaged."""


def _patiently(read: Callable[[], Any]) -> Any:
    """What `read` returns. It is called again where it fails, and a few times more where the storage is at fault.

    Raises:
      _Unreadable: where the storage fails to the last.
      Exception: the error of the second call, where something else is at fault.
    """
    for wait in RETRY_SECONDS:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:
            logging.warning("a checkpoint cannot be read (%s); once more", first_line(error))
            passing = _may_pass(error)
        if not passing:
            break
        time.sleep(wait)
    try:
        return read()
    except Exception as error:
        if _may_pass(error):
            raise _Unreadable(first_line(error)) from error
        raise


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of the storage or of the way to it and not of what is stored."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in PASSING) or any(text in str(error) for text in PASSING_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Best(policy.PreservationPolicy):
    """Tells Orbax to keep the `number` checkpoints with the greatest `sign` · `metric`; equal ones as `rank` has it."""

    def __init__(self, number: int, metric: str, sign: int):
        self._number, self._metric, self._sign = number, metric, sign
        self._values: dict[int, tuple[float, float, int]] = {}

    def note(self, rows: list[dict[str, Any]]) -> None:
        """Takes note of the metric in rows of metrics.jsonl."""
        self._values |= {row["step"]: rank(row, self._metric, self._sign) for row in rows if self._metric in row}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Says for each checkpoint whether it is one of the best; Orbax calls this."""
        del context
        known = sorted(self._values[info.step] for info in checkpoints if info.step in self._values)
        best = {step for *_, step in known[len(known) - self._number :]} if self._number else set()
        return [info.step in best for info in checkpoints]


def checkpoints_exist(folder: epath.PathLike) -> bool:
    """Returns whether a run has saved anything in `folder`, the folder `checkpoints/` of its work folder."""
    return bool(saved_steps(folder))


def checksums(tree: Any) -> dict[str, jax.Array]:
    """Computes a checksum of each array of a tree.

    It is the sum of (2 i + 1) w_i modulo 2³² over the array's 32-bit words w_i, or over its bytes or 16-bit words where
    the type is smaller. This is exact and does not depend on the order of the summation, so it is the same however the
    array is split over devices. Every change of a single word changes it.

    Returns:
      Path of an array in the tree -> uint32 scalar.
    """

    def checksum(leaf):
        width = leaf.dtype.itemsize
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        words = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32))
        words = words.astype(jnp.uint32)
        index, stride = jnp.zeros(words.shape, jnp.uint32), 1
        for axis in reversed(range(words.ndim)):
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= words.shape[axis]
        return jnp.sum((2 * index + 1) * words, dtype=jnp.uint32)

    return {_path(path): checksum(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def restore_weights(
    folder: epath.PathLike,
    sharding: jax.sharding.Sharding,
    step: int | None = None,
    with_memory: bool = False,
    prefer: int | None = None,
) -> tuple[int, Any, Any, Any]:
    """Reads the weights alone from a checkpoint; nothing is written.

    Their shapes are taken from the checkpoint, so they are read whatever method and optimiser the run had.

    Args:
      folder: the folder `checkpoints/` of a work folder.
      sharding: the sharding that each array gets.
      step: which checkpoint; None = `prefer`, or else the newest that is not damaged.
      with_memory: whether what the method remembers is read too.
      prefer: a step, or None.

    Returns:
      The step; the averaged weights, or the weights themselves where the run keeps no average; the moving averages of
      batch norm; and what the method remembers, or None.

    Raises:
      UserError: where there is no complete checkpoint, or not that of this step, or where it is damaged or all are.
    """
    folder = files.absolute(folder)
    if not folder.exists():
        raise UserError(f"{folder} does not exist, expected the checkpoints of a run; has it saved one yet?")
    handlers = {"tree": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        found = sorted(manager.all_steps(), key=lambda saved: (saved == prefer, saved), reverse=True)
        if not found:
            raise UserError(f"{folder} has no complete checkpoint; has the run saved one yet?")
        if step is not None and step not in found:
            raise UserError(
                f"{folder} has no checkpoint of step {step}; there are {', '.join(map(str, sorted(found)))}"
            )
        for candidate in found if step is None else [step]:
            try:
                return candidate, *_patiently(lambda step=candidate: _weights(manager, step, sharding, with_memory))
            except _Unreadable as error:
                raise UserError(f"{folder / str(candidate)} cannot be read now: {error}; try again") from None
            except Exception as error:  # damaged files make the library raise errors of any kind
                logging.warning("the checkpoint at step %d of %s is damaged (%s)", candidate, folder, first_line(error))
    raise UserError(f"{folder}: {'no checkpoint' if step is None else f'checkpoint {step}'} can be read, see above")


def _weights(
    manager: ocp.CheckpointManager, step: int, sharding: jax.sharding.Sharding, with_memory: bool
) -> tuple[Any, Any, Any]:
    """Returns what `restore_weights` returns, without the step, for one checkpoint. Raises where it is damaged."""
    state, window = manager.item_metadata(step)["tree"].tree
    weights = "params" if state["ema_params"] is None else "ema_params"
    wanted = {
        name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state[name])
        for name in (weights, "batch_stats", *(["method"] if with_memory else []))
    }
    # Orbax does not read arrays in whose place there is a placeholder.
    state, window = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, (state, window))
    target = ({**state, **wanted}, window)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            tree=ocp.args.PyTreeRestore(target, restore_args=restore_args), data=ocp.args.JsonRestore()
        ),
    )
    state, _ = restored["tree"]
    _check_sums({"0": {name: state[name] for name in wanted}}, restored["data"]["checksums"], jax.jit(checksums))
    return state[weights], state["batch_stats"], state["method"] if with_memory else None


def _check_sums(tree: Any, saved: dict[str, int], checksums: Callable[[Any], dict[str, jax.Array]]) -> None:
    """Raises ValueError where a checksum of the tree is not the one that was saved."""
    for name, value in jax.device_get(checksums(tree)).items():
        if saved[name] != int(value):
            raise ValueError(f"{name} is not what was saved")


def _path(path: tuple) -> str:
    """Returns the path of an array in a tree as text, such as `0/params/conv0/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _shapes(tree: Any) -> dict[str, tuple]:
    """Returns path -> (shape, name of the dtype) for every array of a tree, or of a tree of metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        _path(path): (
            tuple(leaf.shape),
            str(jax.numpy.dtype(leaf.dtype)),
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
