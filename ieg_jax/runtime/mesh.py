"""Builds the mesh of devices, and says how arrays are split over it.

The mesh has two axes, `data` and `fsdp`. The leading axis of a batch is split over both. Every device has all
parameters, their moving average and the optimiser's state, unless `mesh.fsdp` is above 1: then they are split over the
axis `fsdp` (fully sharded data parallelism, Zhao et al. 2023). They then take less device memory, and the parameters
are gathered in each forward and backward pass. The result does not depend on the size of either axis.
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
    """A mesh, and the shardings of arrays on it.

    Attributes:
      mesh: the devices.
      batch: splits the leading axis of an array over all devices.
      replicated: puts the whole array on each device.
    """

    mesh: Mesh
    batch: NamedSharding
    replicated: NamedSharding

    @property
    def num_devices(self) -> int:
        """How many devices are in the mesh."""
        return self.mesh.size

    def split(self, tree: Any) -> Any:
        """Returns a tree of shardings that split the arrays of `tree` over the axis `fsdp` of the mesh.

        Each array is split along its longest axis that can be divided evenly. An array without such an axis, for
        instance the bias of an odd number of classes, is not split.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, _split(leaf.shape, self.mesh.shape[FSDP])), tree)


def validate(mesh: ConfigDict) -> None:
    """Raises UserError for a value in the group `mesh` of the configuration that is not allowed."""
    checks = {"data": number(lambda v: v == -1 or v >= 1, "-1 (all devices) or at least 1"), "fsdp": at_least(1)}
    config_lib.check_values(mesh, checks, "mesh.")


def create(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Shardings:
    """Builds the mesh that `config.mesh` describes.

    Args:
      config: the configuration; `trusted.batch_size` must be resolved.
      devices: the devices to choose from; None = those of all processes.

    Raises:
      UserError: for more devices than there are, for fewer than all devices where several processes run together, and
        for a batch that the devices do not divide.
    """
    # The devices of a process must be neighbours in the mesh, because each process holds consecutive rows of the batch.
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
    # With axes of type Auto the compiler chooses how intermediate arrays are split. The default would be Explicit.
    mesh = Mesh(np.asarray(devices[:count]).reshape(data, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)
    return Shardings(
        mesh=mesh,
        batch=NamedSharding(mesh, PartitionSpec((DATA, FSDP))),
        replicated=NamedSharding(mesh, PartitionSpec()),
    )


def _split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """Says along which axis an array of this shape is split into parts."""
    if parts == 1:
        return PartitionSpec()
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if not axes:
        return PartitionSpec()
    # Of several axes with the greatest length the last one is split. In the kernel of a layer it is the axis of the
    # outputs, and neighbours along it are also neighbours in device memory.
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[FSDP if axis == longest else None for axis in range(longest + 1)])
