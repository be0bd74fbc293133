"""Checkpoints: Orbax, the JAX ecosystem's library for them, which writes asynchronously and atomically."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from ieg_jax.errors import UserError


class Checkpoints:
    """The folder `checkpoints/` of a work folder, one subfolder a step."""

    def __init__(self, folder: epath.PathLike, checkpoint: ConfigDict):
        """Opens the folder, making it where it is missing.

        Args:
          folder: path, local or on a bucket.
          checkpoint: the group `checkpoint` of the configuration.
        """
        self.folder = epath.Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=checkpoint.keep, keep_period=checkpoint.keep_every_steps or None
        )
        # Named here, so that what is in a checkpoint can be asked before anything is saved or restored.
        handlers = {"tree": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any, position: int) -> None:
        """Starts to save a tree of arrays; the arrays are copied before this returns, written after it.

        Args:
          step: updates made so far. A step that is there already is left as it is.
          tree: e.g. the train state and the metrics window.
          position: noisy examples seen so far, where the data goes on.
        """
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), data=ocp.args.JsonSave({"position": position})),
        )

    def restore(self, step: int, like: Any) -> tuple[Any, int]:
        """Restores what `save` saved at `step`.

        Args:
          step: of a complete checkpoint.
          like: tree of arrays (or `jax.ShapeDtypeStruct`) with the shapes, dtypes and shardings to restore to.

        Returns:
          The tree, and the position of the data.

        Raises:
          UserError: where the checkpoint holds another tree, such as that of another model.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        saved = _shapes(self._manager.item_metadata(step)["tree"])
        wanted = _shapes(target)
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
        restored = self._manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        )
        return restored["tree"], restored["data"]["position"]

    def wait(self) -> None:
        """Waits until what was saved is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        self._manager.close()


def restore_weights(folder: epath.PathLike, sharding: jax.sharding.Sharding) -> tuple[int, Any, Any]:
    """Reads the weights alone from the newest checkpoint; nothing is written.

    Their shapes are taken from the checkpoint, so it does not matter which method and optimiser it belongs to.

    Args:
      folder: `checkpoints/` of a work folder.
      sharding: to put each array in.

    Returns:
      The step, the averaged weights (the raw ones of a run without an average), and the moving averages of batch
      norm.

    Raises:
      UserError: where there is no complete checkpoint.
    """
    folder = epath.Path(folder).resolve()
    if not folder.exists():
        raise UserError(f"{folder} does not exist, expected the checkpoints of a run; has it saved one yet?")
    handlers = {"tree": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{folder} has no complete checkpoint; has the run saved one yet?")
        state, window = manager.item_metadata(step)["tree"].tree
        weights = "params" if state["ema_params"] is None else "ema_params"
        wanted = {
            name: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state[name]
            )
            for name in (weights, "batch_stats")
        }
        # What has a placeholder is not read.
        state, window = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, (state, window))
        target = ({**state, **wanted}, window)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        restored = manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.PyTreeRestore(target, restore_args=restore_args))
        )
    state, _ = restored["tree"]
    return step, state[weights], state["batch_stats"]


def _shapes(tree: Any) -> dict[str, tuple]:
    """Path -> (shape, dtype name) for every array of a tree or of its metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): (
            tuple(leaf.shape),
            str(jax.numpy.dtype(leaf.dtype)),
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
