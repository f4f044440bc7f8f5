"""Where arrays live: the mesh, the rule that shards the state, and the way of a host batch onto the devices.

One mesh of ('data', 'fsdp'): batches are split over both axes, the large arrays of the state over 'fsdp' alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sr3_jax.aliases import UserError

AXES = ("data", "fsdp")
FSDP_MIN_BYTES = 4 * 2**20  # smaller arrays cost less to keep everywhere than to gather


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes; -1 for one of the sizes takes what is left.

    Where the devices come in slices (TPU pods joined by the data-centre network), 'data' goes across the slices and
    'fsdp' stays within one: gathering weights needs the fast links, averaging gradients once a step does not.

    Args:
        devices: instead of all that there are, such as those of a topology that is only planned for.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or 'fsdp' does not fit a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    known = math.prod(size for size in (data, fsdp) if size != -1)
    if (data, fsdp).count(-1) == 1 and known > 0 and count % known == 0:
        data, fsdp = (count // known if size == -1 else size for size in (data, fsdp))
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise UserError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not fit {count} devices: "
            f"give sizes whose product is {count}, or -1 for one of them"
        )
    slices = len({getattr(device, "slice_index", None) for device in devices})
    # Auto axes: Linen's convolutions fail on sharded weights under jax.make_mesh's default of Explicit ones.
    auto = (AxisType.Auto,) * 2
    if slices == 1:
        return jax.make_mesh((data, fsdp), AXES, axis_types=auto, devices=devices)
    if data % slices:
        raise UserError(
            f"mesh.fsdp={fsdp} does not fit a slice of {count // slices} devices ({slices} slices): "
            "give a size that divides it"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=auto)


def fsdp_spec(shape: tuple[int, ...], itemsize: int, fsdp: int) -> PartitionSpec:
    """The rule of the state: arrays above 4 MB are split over 'fsdp' on their largest axis that divides."""
    if fsdp == 1 or math.prod(shape) * itemsize < FSDP_MIN_BYTES:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % fsdp == 0:
            return PartitionSpec(*(["fsdp" if i == axis else None for i in range(axis + 1)]))
    return PartitionSpec()


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a state (or of its `jax.eval_shape`), by `fsdp_spec`."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, leaf.dtype.itemsize, fsdp)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> the global arrays, split over all devices; returns before the copy is done."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
