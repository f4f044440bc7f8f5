"""Meshes of 8 simulated devices, the sharding rule, and transfers between host and devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from sr3_jax.distributed import sharding
from sr3_jax.errors import UserError


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1)),
        ({"data": -1, "fsdp": 8}, (1, 8)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": 4, "fsdp": 2}, (4, 2)),
        ({"fsdp": 0, "state_bytes": lambda: 2**30}, (1, 8)),
    ],
)
def test_mesh_has_all_devices(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert sharding.mesh_sizes(8, **sizes) == shape
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
    "sizes", [(3, 1), (-1, 3), (-1, -1), (0, 8), (3, 0), (-2, -4), (16, 1), (8, 2), (-1, 16)]
)
def test_mesh_sizes_that_do_not_match_the_devices_fail(sizes):
    data, fsdp = sizes
    with pytest.raises(UserError) as error:
        sharding.mesh_sizes(8, data=data, fsdp=fsdp)
    for text in (f"config.mesh.data={data} ", f"config.mesh.fsdp={fsdp} ", "8 devices"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("count", "slices", "gib", "sizes"),
    [
        (1, 1, 9, (1, 1)),
        (4, 1, 9, (1, 4)),
        (6, 1, 9, (3, 2)),
        (8, 1, 9, (1, 8)),
        (8, 1, 0.5, (8, 1)),
        (256, 1, 9, (32, 8)),
        (64, 8, 9, (8, 8)),
        (64, 16, 9, (16, 4)),  # stays within nodes of 4
        (5, 1, 9, (5, 1)),
    ],
)
def test_fsdp_is_chosen_from_the_devices_unless_given(count, slices, gib, sizes):
    def state_bytes():
        return int(gib * 2**30)

    assert sharding.mesh_sizes(count, fsdp=0, slices=slices, state_bytes=state_bytes) == sizes
    data, fsdp = sizes
    assert sharding.mesh_sizes(count, data=data, fsdp=0, slices=slices) == sizes  # what remains
    assert sharding.mesh_sizes(count, fsdp=fsdp, slices=slices) == sizes


@pytest.mark.parametrize(
    ("shape", "itemsize", "fsdp", "spec"),
    [
        ((1024, 1024), 4, 8, Spec("fsdp")),  # 4 MB; the first of equal axes
        ((1024, 1023), 4, 8, Spec()),  # below 4 MB
        ((1024, 1024), 2, 8, Spec()),  # the limit is in bytes
        ((1024, 2048), 2, 8, Spec(None, "fsdp")),  # the largest axis
        ((3, 3, 512, 1024), 4, 8, Spec(None, None, None, "fsdp")),
        ((3, 3, 1024, 512), 4, 8, Spec(None, None, "fsdp")),
        ((1028, 1026, 8), 4, 8, Spec(None, None, "fsdp")),  # the largest divisible axis
        ((1025, 1027), 4, 8, Spec()),  # no divisible axis
        ((4096, 4096), 4, 1, Spec()),  # nothing to split over
        ((), 4, 8, Spec()),
    ],
)
def test_fsdp_spec(shape, itemsize, fsdp, spec):
    assert sharding.fsdp_spec(shape, itemsize, fsdp) == spec


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_large_state_arrays_are_sharded_equally(data, fsdp):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    tree = {
        "kernel": jax.ShapeDtypeStruct((1024, 2048), np.float32),
        "bias": jax.ShapeDtypeStruct((8,), np.float32),
    }
    shardings = sharding.state_shardings(tree, mesh)
    assert shardings["kernel"].shard_shape((1024, 2048)) == (1024, 2048 // fsdp)
    assert shardings["bias"].shard_shape((8,)) == (8,)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_batch_rows_are_split_over_devices(data, fsdp):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    rows = {
        "image": np.arange(16 * 4, dtype=np.uint8).reshape(16, 2, 2, 1),
        "label": np.arange(16, dtype=np.int32),
    }
    batch = sharding.to_global(rows, mesh)
    for name, array in batch.items():
        assert array.shape == rows[name].shape and array.dtype == rows[name].dtype
        np.testing.assert_array_equal(array, rows[name])
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, *rows[name].shape[1:])}
        starts = sorted(shard.index[0].start for shard in array.addressable_shards)
        assert starts == list(range(0, 16, 2))


def test_replicated_arrays_are_complete_on_every_device():
    array = jax.device_put(np.ones((3, 5)), sharding.replicated(sharding.make_mesh(data=2, fsdp=4)))
    assert [shard.data.shape for shard in array.addressable_shards] == [(3, 5)] * 8


class Device:
    """The attributes of a device in a pod of two slices that mesh creation reads."""

    platform, device_kind = "gpu", "H100"

    def __init__(self, index: int, slice_index: int) -> None:
        self.id, self.slice_index, self.process_index = index, slice_index, index // 2


def two_slices() -> list:
    order = np.random.default_rng(0).permutation(16)
    return [Device(int(index), int(index) // 8) for index in order]


@pytest.mark.parametrize(("data", "fsdp"), [(16, 1), (4, 4), (2, 8)])
def test_fsdp_axis_stays_within_a_slice(data, fsdp):
    mesh = sharding.make_mesh(data=data, fsdp=-1, devices=two_slices())
    assert mesh.devices.shape == (data, fsdp) and mesh.axis_names == ("data", "fsdp")
    assert len({device.id for device in mesh.devices.flat}) == 16
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert all(len(set(row)) == 1 for row in slices)
    assert (slices[: data // 2] == 0).all() and (slices[data // 2 :] == 1).all()


def test_fsdp_larger_than_a_slice_fails():
    with pytest.raises(UserError, match=r"config\.mesh\.fsdp=16 .*8 devices"):
        sharding.make_mesh(data=1, fsdp=16, devices=two_slices())


def test_local_rows_match_the_devices_in_any_order():
    """The devices of a mesh may have any order."""
    mesh = sharding.make_mesh(devices=[jax.devices()[index] for index in (5, 0, 7, 2, 1, 4, 3, 6)])
    assert list(sharding.local_rows(mesh, 16)) == list(range(16))
    rows = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)}
    batch = sharding.to_global(rows, mesh, rows=sharding.local_rows(mesh, 16), batch_size=16)["image"]
    np.testing.assert_array_equal(batch, rows["image"])
    for shard in batch.addressable_shards:
        place = [device.id for device in mesh.devices.flat].index(shard.device.id)
        np.testing.assert_array_equal(shard.data, rows["image"][2 * place : 2 * place + 2])


def test_single_process_max_and_transfer_to_host():
    mesh = sharding.make_mesh()
    assert sharding.process_max(7, mesh) == 7
    array = jax.device_put(np.arange(16.0), sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(sharding.to_host({"a": array}, mesh)["a"], np.arange(16.0))
