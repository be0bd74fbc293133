"""The mesh of devices and the two ways an array lies on it: split along its leading axis, or whole on each."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ieg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its shardings."""

    mesh: Mesh
    batch: NamedSharding  # leading axis over the devices
    replicated: NamedSharding  # the whole array on each device

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return self.mesh.size


def create(config: ConfigDict) -> Layout:
    """Builds the mesh that `config.mesh` names: one axis, `data`.

    Raises:
      UserError: for more devices than there are, or a batch that they do not divide.
    """
    available = jax.devices()
    count = len(available) if config.mesh.data == -1 else config.mesh.data
    if count > len(available):
        raise UserError(f"mesh.data={count}, but there are {len(available)} devices; lower it, or -1 for all")
    for key, size in (
        ("batch_size", config.batch_size),
        ("trusted.batch_size", config.trusted.batch_size),
        ("eval_batch_size", config.eval_batch_size),
    ):
        if size % count:
            raise UserError(f"{key}={size} is not a multiple of the {count} devices; change it or mesh.data")
    # Auto: the compiler chooses how intermediate arrays lie (jax.make_mesh makes Explicit axes by default).
    mesh = Mesh(np.asarray(available[:count]), ("data",), axis_types=(AxisType.Auto,))
    return Layout(mesh, NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()))
