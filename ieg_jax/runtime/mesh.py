"""The mesh of devices and how arrays lie on it.

The mesh has two axes, `data` and `fsdp`. The leading axis of a batch is split over both. Parameters, their moving
average and the optimiser's state are whole on each device, or, where `mesh.fsdp` is above 1, split over that axis
(fully sharded data parallelism, Zhao et al. 2023): it divides their memory, and costs a gathering of the parameters
in each forward and backward pass. The result does not depend on either number.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ieg_jax import config as config_lib
from ieg_jax.config import at_least, number
from ieg_jax.errors import UserError

DATA, FSDP = "data", "fsdp"


@dataclasses.dataclass(frozen=True)
class Shardings:
    """A mesh with its shardings."""

    mesh: Mesh
    batch: NamedSharding  # leading axis over all devices
    replicated: NamedSharding  # the whole array on each device

    @property
    def num_devices(self) -> int:
        """Devices in the mesh."""
        return self.mesh.size

    def split(self, tree: Any) -> Any:
        """A tree of shardings that splits each array of `tree` over the axis `fsdp`.

        Of each array the longest axis that the number of devices divides is split; one that has none, such as the
        bias of an odd number of classes, is left whole.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, _split(leaf.shape, self.mesh.shape[FSDP])), tree)


def validate(mesh: ConfigDict) -> None:
    """Raises UserError for a value in the group `mesh` of the configuration that is not allowed."""
    checks = {"data": number(lambda v: v == -1 or v >= 1, "-1 (all devices) or at least 1"), "fsdp": at_least(1)}
    config_lib.check_values(mesh, checks, "mesh.")


def create(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Shardings:
    """Builds the mesh that `config.mesh` names.

    Args:
      config: the configuration; `trusted.batch_size` must be resolved.
      devices: to use; None = all there are, of all processes.

    Raises:
      UserError: for more devices than there are, fewer than the processes have, or a batch that they do not divide.
    """
    # Each process holds consecutive rows of the batch, whatever order the devices are numbered in.
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id)
    )
    available, fsdp = len(devices), config.mesh.fsdp
    if config.mesh.data == -1 and available % fsdp:
        raise UserError(f"mesh.fsdp={fsdp} does not divide the {available} devices; change it, or set mesh.data")
    data = available // fsdp if config.mesh.data == -1 else config.mesh.data
    count = data * fsdp
    if not 1 <= count <= available:
        shown = f"mesh.data={config.mesh.data}" + (f" × mesh.fsdp={fsdp}" if fsdp > 1 else "")
        raise UserError(f"{shown}, but there are {available} devices; lower it, or mesh.data=-1 for all")
    if count < available and devices[-1].process_index != devices[0].process_index:
        raise UserError(
            f"mesh.data={data} × mesh.fsdp={fsdp} uses {count} of {available} devices; where several processes run "
            f"together all must be used: set mesh.data=-1, and mesh.fsdp to a divisor of {available}"
        )
    for key, size in (
        ("batch_size", config.batch_size),
        ("trusted.batch_size", config.trusted.batch_size),
        ("eval_batch_size", config.eval_batch_size),
    ):
        if size % count:
            raise UserError(f"{key}={size} is not a multiple of the {count} devices; change it or mesh.data")
    # Auto: the compiler chooses how intermediate arrays lie (jax.make_mesh makes Explicit axes by default).
    mesh = Mesh(np.asarray(devices[:count]).reshape(data, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)
    return Shardings(
        mesh=mesh,
        batch=NamedSharding(mesh, PartitionSpec((DATA, FSDP))),
        replicated=NamedSharding(mesh, PartitionSpec()),
    )


def _split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    if parts == 1:
        return PartitionSpec()
    # The last of the longest: it is the output of a layer, and the fastest axis in memory.
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[FSDP if axis == longest else None for axis in range(longest + 1)])
