"""Topologies by name, and the devices that libtpu reports for them."""

from __future__ import annotations

import importlib.util
import os

import pytest

from sr3_jax.errors import UserError
from sr3_jax.planning import topologies


@pytest.mark.parametrize(
    ("text", "chip", "count"),
    [
        ("v5e:16x16", "v5e", 256),
        ("v5e:1x1", "v5e", 1),
        ("v6e:4x4", "v6e", 16),
        ("V4:4x4x4", "v4", 64),
        ("v4:2x2x1", "v4", 4),
        ("v5p:4x8x8", "v5p", 256),
        ("gpu:8xh100", "h100", 8),
        ("gpu:16xA100", "a100", 16),
        ("gpu:3x4xh200", "h200", 12),
        ("cpu:8", "cpu", 8),
    ],
)
def test_parse(text, chip, count):
    topology = topologies.parse(text)
    assert (topology.name, topology.chip.name, topology.count) == (text.lower(), chip, count)
    assert topologies.parse(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("v5e", "v5e:16x16"),
        ("v7x:4x4", "v5e:16x16"),
        ("v5:4x4", "v5"),
        ("tpu", "cpu:8"),
        ("", "cpu:8"),
        ("v5e:3x3", "2x2, 2x4, 4x4"),
        ("v5e:4x4x4", "2x2, 2x4, 4x4"),
        ("v6e:16", "v6e:4x4"),
        ("v6e:", "v6e:4x4"),
        ("v6e:4x-4", "v6e:4x4"),
        ("v4:4x4", "2x2x1"),
        ("v4:3x4x4", "4x4x8"),
        ("v4:8x4x4", "4x4x8"),
        ("v4:0x0x0", "2x2x1"),
        ("v4:16x16x20", "4096 chips"),
        ("gpu:8", "gpu:8xh100"),
        ("gpu:0xh100", "gpu:8xh100"),
        ("gpu:12xh100", "gpu:3x4xh100"),
        ("gpu:8xb200", "a100, h100, h200"),
        ("cpu:0", "cpu:8"),
        ("cpu:x", "cpu:8"),
    ],
)
def test_an_unknown_topology_is_an_error_with_an_example(text, fix):
    with pytest.raises(UserError) as caught:
        topologies.parse(text)
    assert f"--topology={text}" in str(caught.value) and fix in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "slices"),
    [("gpu:4xh100", 1), ("gpu:8xh100", 1), ("gpu:64xh100", 8), ("gpu:16x4xh100", 16), ("v5e:16x16", 1)],
)
def test_gpus_are_divided_into_nodes(text, slices):
    topology = topologies.parse(text)
    assert topology.slices == slices and topology.count % slices == 0


def test_memory_per_chip():
    assert all(chip.memory for chip in topologies.CHIPS.values() if chip.backend != "cpu")
    one, eight = (topologies.parse(f"cpu:{count}").memory for count in (1, 8))
    assert one // 8 == eight > 0  # CPU devices share the machine's memory


def test_without_libtpu_the_error_names_two_fixes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"v6e:4x4.*pip install.*--estimate"),
        topologies.compiler(topologies.parse("v6e:4x4")),
    ):
        pass


@pytest.mark.parametrize("text", ["v5e:1x1", "v5e:2x4", "v4:2x2x1", "v5p:2x2x1", "v6e:4x4", "v4:4x4x4"])
def test_libtpu_reports_one_device_per_chip_and_the_environment_is_restored(text):
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    topology = topologies.parse(text)
    with topologies.compiler(topology) as devices:
        assert len(devices) == topology.count and len(set(devices)) == topology.count
        assert {device.platform for device in devices} == {"tpu"}
    changed = {name for name in before.keys() | os.environ if before.get(name) != os.environ.get(name)}
    assert not {name for name in changed if name.startswith(("TPU_", "TF_CPP", "ALLOW_MULTIPLE"))}
