"""The device mesh, the rule that shards the training state, and transfers between host and devices.

The mesh axes are ('data', 'fsdp'): batches are split over both, large arrays of the state over 'fsdp' only.
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
FSDP_MIN_BYTES = 4 * 2**20  # replicating a smaller array costs less than gathering it
GATHERED_MAX_BYTES = 4 * 2**30  # of weights that a device holds as a whole while it samples
CHOSEN_FSDP = 8  # at most, when the size of 'fsdp' is chosen: a GPU node has 8, and no preset needs more
CHOSEN_MIN_BYTES = 2**30  # a smaller state is not worth sharding


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,
    state_bytes: Callable[[], int] = lambda: 0,
) -> Mesh:
    """Make a mesh over all devices of all processes.

    With several slices (TPU slices or GPU nodes, connected by the data center network), 'data' spans the slices and
    'fsdp' stays within one: gathering weights needs the fast links, averaging gradients once per step does not.

    Args:
        data, fsdp, state_bytes: see `mesh_sizes`.
        devices: used in place of `jax.devices()`, for example those of a topology to plan for.

    Raises:
        UserError: the product of the sizes is not the number of devices, or 'fsdp' does not fit into a slice.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    data, fsdp = mesh_sizes(len(devices), data=data, fsdp=fsdp, slices=slices, state_bytes=state_bytes)
    # Not jax.make_mesh: on most tori it assigns only whole sides to an axis, and 8 of 4x4 chips are not a whole side.
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp), (slices, 1), devices, allow_split_physical_axes=True
        )
    # Auto axes: with Explicit ones, the default, Linen's convolutions fail on sharded weights.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


def mesh_sizes(
    count: int,
    *,
    data: int = -1,
    fsdp: int = 1,
    slices: int = 1,
    state_bytes: Callable[[], int] = lambda: 0,
) -> tuple[int, int]:
    """The sizes of ('data', 'fsdp') over `count` devices, with -1 and 0 replaced.

    Args:
        data, fsdp: axis sizes; -1 for one of them means all remaining devices. 0 for 'fsdp': the remaining devices if
            'data' is given; else up to 8 devices of a slice for a state of 1 GiB or more, and 1 for a smaller one. The
            choice depends on the number of devices only, not on their memory, so that `sr3 plan` makes the same one.
        slices: groups of devices with fast links, over which the devices are divided equally.
        state_bytes: computes the bytes of the training state; called only for the choice.

    Raises:
        UserError: the product of the sizes is not `count`, or 'fsdp' does not fit into a slice.
    """
    given, per_slice = (data, fsdp), count // slices
    if fsdp == 0 and data != -1:
        fsdp = -1
    elif fsdp == 0:
        large = per_slice > 1 and state_bytes() >= CHOSEN_MIN_BYTES
        fsdp = math.gcd(per_slice, CHOSEN_FSDP) if large else 1
    known = math.prod(size for size in (data, fsdp) if size != -1)
    if (data, fsdp).count(-1) == 1 and known > 0 and count % known == 0:
        data, fsdp = (count // known if size == -1 else size for size in (data, fsdp))
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise UserError(
            f"config.mesh.data={given[0]} and config.mesh.fsdp={given[1]} do not fit {count} devices: "
            f"use sizes whose product is {count}, or -1 for one of them"
        )
    if data % slices:
        raise UserError(
            f"config.mesh.fsdp={fsdp} does not fit into {slices} slices or nodes of {per_slice} devices: use a size "
            f"that divides {per_slice}"
        )
    return data, fsdp


def mesh_for_batch(batch_size: int) -> Mesh:
    """A mesh over the largest number of this process's devices that divides the batch size.

    Local devices only, because processes upscale different files.
    """
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:count])[:, None], AXES, axis_types=(AxisType.Auto,) * 2)


def fsdp_spec(shape: tuple[int, ...], itemsize: int, fsdp: int) -> PartitionSpec:
    """The sharding rule: arrays of 4 MB or more are split over 'fsdp' along their largest divisible axis.

    Args:
        itemsize: bytes per element.
        fsdp: size of the mesh axis.
    """
    if fsdp == 1 or math.prod(shape) * itemsize < FSDP_MIN_BYTES:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
        if shape[axis] % fsdp == 0:
            return PartitionSpec(*(["fsdp" if i == axis else None for i in range(axis + 1)]))
    return PartitionSpec()


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a state, or of its `jax.eval_shape`, by `fsdp_spec`."""
    fsdp = mesh.shape["fsdp"]
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, leaf.dtype.itemsize, fsdp)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Each device has the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def gathered(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: the same arrays, whole on each device if they are small enough, for a loop that reads them often.

    Without it, each step of a sampling loop gathers all weights that are split over 'fsdp' again.
    """
    if sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) > GATHERED_MAX_BYTES:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices, in ascending order, of the rows of a global batch on this process's devices: those it has to decode."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_global(
    batch: Mapping[str, np.ndarray], mesh: Mesh, *, rows: np.ndarray | None = None, batch_size: int = 0
) -> dict[str, jax.Array]:
    """Copy a host batch into global arrays, split over all devices. Returns before the copy has finished.

    Args:
        batch: arrays whose first axis is the batch.
        rows: the indices of these rows in the global batch (`local_rows`); None if every process has the whole batch.
        batch_size: of the global batch; needed with `rows`.
    """
    sharding = batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        whole = np.arange(len(array)) if rows is None else rows
        shape = (len(array) if rows is None else batch_size, *array.shape[1:])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0]) if index else (0, shape[0], 1)
            first = int(np.searchsorted(whole, start))
            return array[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(array) for name, array in batch.items()}


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Copy arrays of any sharding to whole NumPy arrays on every process. All processes must call it."""
    if jax.process_count() > 1:
        tree = _gather(mesh)(tree)
    return jax.device_get(tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def process_max(value: int, mesh: Mesh) -> Any:
    """The maximum of a number over all processes, without waiting for it; int() of the result waits.

    It lets processes stop at the same step, although a signal or a deadline reaches each at a different time. All
    processes must call it.
    """
    if jax.process_count() == 1:
        return value
    local = np.full([len(mesh.local_devices)], value, np.int32)
    rows = local_rows(mesh, mesh.size)
    values = to_global({"values": local}, mesh, rows=rows, batch_size=mesh.size)["values"]
    return _maximum(mesh)(values)


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=replicated(mesh))
