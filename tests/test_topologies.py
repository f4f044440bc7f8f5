"""Slices by name: what is taken, what is refused and in which words, and libtpu's own count of the devices."""

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
        ("cpu:8", "cpu", 8),
    ],
)
def test_names_of_topologies(text, chip, count):
    topology = topologies.parse(text)
    assert (topology.name, topology.chip.name, topology.count) == (text.lower(), chip, count)
    assert topologies.parse(topology.name) == topology


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "v5e is not known; give one such as"),
        ("v7x:4x4", "v7x:4x4 is not known"),
        ("v5:4x4", "perhaps v5"),
        ("tpu", "not known"),
        ("", "not known"),
        ("v5e:3x3", "v5e comes as 1x1, 2x2, 2x4, 4x4"),
        ("v5e:4x4x4", "v5e comes as 1x1"),
        ("v6e:16", "give the shape of the slice, such as v6e:4x4"),
        ("v6e:", "give the shape"),
        ("v6e:4x-4", "give the shape"),
        ("v4:4x4", "v4 comes as 2x2x1"),
        ("v4:3x4x4", "three multiples of 4"),
        ("v4:8x4x4", "ascending"),
        ("v4:0x0x0", "v4 comes as"),
        ("v4:16x16x20", "up to 4096 chips"),
        ("gpu:8", "such as gpu:8xh100"),
        ("gpu:0xh100", "such as gpu:8xh100"),
        ("gpu:8xb200", "a100, h100, h200"),
        ("cpu:0", "such as cpu:8"),
        ("cpu:x", "such as cpu:8"),
    ],
)
def test_what_is_no_topology_is_one_sentence(text, words):
    with pytest.raises(UserError) as caught:
        topologies.parse(text)
    assert words in str(caught.value) and f"--topology={text}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_planned_chip_has_all_its_figures():
    for chip in topologies.CHIPS.values():
        figures = (chip.memory, chip.flops, chip.bandwidth, chip.interconnect)
        if chip.backend != "cpu":
            assert all(figures), chip
            # Hundreds of FLOPs for each byte of memory, which is faster than the links.
            assert 100 < chip.flops / chip.bandwidth < 1000, chip
            assert chip.bandwidth > chip.interconnect, chip
    gib = {name: chip.memory / 2**30 for name, chip in topologies.CHIPS.items() if chip.backend == "tpu"}
    assert gib == pytest.approx({"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}, abs=0.01)


def test_processors_share_the_machines_memory():
    one, eight = (topologies.parse(f"cpu:{count}").memory for count in (1, 8))
    assert one // 8 == eight > 0


def test_without_libtpu_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r'pip install "sr3_jax\[tpu\]".*--topology=cpu:16'),
        topologies.compiler(topologies.parse("v6e:4x4")),
    ):
        pass


@pytest.mark.parametrize("text", ["v5e:1x1", "v5e:2x4", "v4:2x2x1", "v5p:2x2x1", "v6e:4x4", "v4:4x4x4"])
def test_libtpu_has_one_device_a_chip_and_leaves_the_environment(text):
    pytest.importorskip("libtpu")
    before = dict(os.environ)
    topology = topologies.parse(text)
    with topologies.compiler(topology) as devices:
        assert len(devices) == topology.count and len(set(devices)) == topology.count
        assert {device.platform for device in devices} == {"tpu"}
    changed = {name for name in before.keys() | os.environ if before.get(name) != os.environ.get(name)}
    assert not changed & topologies._quiet(topology).keys()
