"""Where arrays live: the mesh, the rule that shards the state, and the way of a host batch onto the devices.

One mesh of ('data', 'fsdp'): batches are split over both axes, the large arrays of the state over 'fsdp' alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sr3_jax.errors import UserError

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
    if data % slices:
        raise UserError(
            f"mesh.fsdp={fsdp} does not fit a slice of {count // slices} devices ({slices} slices): "
            "give a size that divides it"
        )
    # Not jax.make_mesh: on most tori it lays axes along whole sides alone, and 8 of 4x4 chips are no whole side.
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
        )
    # Auto axes: Linen's convolutions fail on sharded weights under the default of Explicit ones.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_for_batch(batch_size: int) -> Mesh:
    """A mesh over as many of this process's own devices as share a batch equally: its part of a folder is its own."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:count])[:, None], AXES, axis_types=(AxisType.Auto,) * 2)


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


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, ascending: what it has to decode."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, rows: np.ndarray | None = None, batch_size: int = 0
) -> dict[str, jax.Array]:
    """Rows of a batch on the host -> the global arrays, split over all devices; returns before the copy is done.

    Args:
        rows: which rows of the global batch these are (`local_rows`); None if every process has the whole batch.
        batch_size: size of the global batch; required with `rows`.
    """
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        whole = np.arange(len(array)) if rows is None else rows
        shape = (len(array) if rows is None else batch_size, *array.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(whole, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(array) for name, array in batch.items()}


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Arrays of any sharding -> whole NumPy arrays, on every process. All processes must call it."""
    if jax.process_count() > 1:
        tree = _gather(mesh)(tree)
    return jax.device_get(tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def process_max(code: int, mesh: Mesh) -> Any:
    """The highest of the processes' numbers, on all of them; int() of it waits for the answer.

    This is how processes stop at the same step: a signal, or the clock, reaches each of them at another moment.
    All processes must call it.
    """
    if jax.process_count() == 1:
        return code
    mine = np.full([len(mesh.local_devices)], code, np.int32)
    rows = local_rows(mesh, mesh.size)
    numbers = to_global({"codes": mine}, mesh, rows=rows, batch_size=mesh.size)["codes"]
    return _maximum(mesh)(numbers)


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=replicated(mesh))
