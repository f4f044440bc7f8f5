"""Meshes of the 8 simulated devices, the sharding rule of the state, and the way of a batch onto the devices."""

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
    ],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


@pytest.mark.parametrize(
    "sizes", [(3, 1), (-1, 3), (-1, -1), (0, 8), (-1, 0), (-2, -4), (16, 1), (8, 2), (-1, 16)]
)
def test_sizes_that_do_not_fit_are_refused_with_the_number_of_devices(sizes):
    data, fsdp = sizes
    with pytest.raises(UserError) as error:
        sharding.make_mesh(data=data, fsdp=fsdp)
    assert str(error.value).startswith(f"mesh.data={data} and mesh.fsdp={fsdp} do not fit 8 devices: ")
    assert "product is 8, or -1 for one of them" in str(error.value)


@pytest.mark.parametrize(
    ("shape", "itemsize", "fsdp", "spec"),
    [
        ((1024, 1024), 4, 8, Spec("fsdp")),  # 4 MB, both axes as large: the first
        ((1024, 1023), 4, 8, Spec()),  # under 4 MB
        ((1024, 1024), 2, 8, Spec()),  # bytes, not numbers
        ((1024, 2048), 2, 8, Spec(None, "fsdp")),  # the largest axis
        ((3, 3, 512, 1024), 4, 8, Spec(None, None, None, "fsdp")),
        ((3, 3, 1024, 512), 4, 8, Spec(None, None, "fsdp")),
        ((1028, 1026, 8), 4, 8, Spec(None, None, "fsdp")),  # the largest axis that divides
        ((1025, 1027), 4, 8, Spec()),  # none divides
        ((4096, 4096), 4, 1, Spec()),  # nothing to split over
        ((), 4, 8, Spec()),
    ],
)
def test_the_rule_of_the_state(shape, itemsize, fsdp, spec):
    assert sharding.fsdp_spec(shape, itemsize, fsdp) == spec


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_state_arrays_lie_in_equal_parts(data, fsdp):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    tree = {
        "kernel": jax.ShapeDtypeStruct((1024, 2048), np.float32),
        "bias": jax.ShapeDtypeStruct((8,), np.float32),
    }
    shardings = sharding.state_shardings(tree, mesh)
    assert shardings["kernel"].shard_shape((1024, 2048)) == (1024, 2048 // fsdp)
    assert shardings["bias"].shard_shape((8,)) == (8,)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_each_device_gets_its_own_rows_of_a_batch(data, fsdp):
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


def test_replicated_is_whole_everywhere():
    array = jax.device_put(np.ones((3, 5)), sharding.replicated(sharding.make_mesh(data=2, fsdp=4)))
    assert [shard.data.shape for shard in array.addressable_shards] == [(3, 5)] * 8


class Device:
    """What a mesh asks of a device of a pod of two slices."""

    platform, device_kind = "gpu", "H100"

    def __init__(self, index: int, slice_index: int) -> None:
        self.id, self.slice_index, self.process_index = index, slice_index, index // 2


def two_slices() -> list:
    order = np.random.default_rng(0).permutation(16)
    return [Device(int(index), int(index) // 8) for index in order]


@pytest.mark.parametrize(("data", "fsdp"), [(16, 1), (4, 4), (2, 8)])
def test_weights_are_gathered_within_a_slice_and_gradients_averaged_across(data, fsdp):
    mesh = sharding.make_mesh(data=data, fsdp=-1, devices=two_slices())
    assert mesh.devices.shape == (data, fsdp) and mesh.axis_names == ("data", "fsdp")
    assert len({device.id for device in mesh.devices.flat}) == 16
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert all(len(set(row)) == 1 for row in slices)
    assert (slices[: data // 2] == 0).all() and (slices[data // 2 :] == 1).all()


def test_weights_over_more_than_a_slice_are_refused():
    with pytest.raises(UserError, match=r"mesh.fsdp=16 does not fit a slice of 8 devices \(2 slices\)"):
        sharding.make_mesh(data=1, fsdp=16, devices=two_slices())


def test_the_rows_of_a_process_are_those_of_its_devices():
    """Of a mesh in any order: half of the devices stand for a process."""
    mesh = sharding.make_mesh(devices=[jax.devices()[index] for index in (5, 0, 7, 2, 1, 4, 3, 6)])
    assert list(sharding.local_rows(mesh, 16)) == list(range(16))
    rows = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)}
    batch = sharding.to_global(rows, mesh, rows=sharding.local_rows(mesh, 16), batch_size=16)["image"]
    np.testing.assert_array_equal(batch, rows["image"])
    for shard in batch.addressable_shards:
        place = [device.id for device in mesh.devices.flat].index(shard.device.id)
        np.testing.assert_array_equal(shard.data, rows["image"][2 * place : 2 * place + 2])


def test_on_one_process_a_vote_is_its_own_and_the_host_gets_whole_arrays():
    mesh = sharding.make_mesh()
    assert sharding.process_max(7, mesh) == 7
    array = jax.device_put(np.arange(16.0), sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(sharding.to_host({"a": array}, mesh)["a"], np.arange(16.0))
