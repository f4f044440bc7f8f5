"""The cache of outputs: which outputs are reused, and which are not."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from sr3_jax import files
from sr3_jax.evaluation.outputs import Output, OutputCache
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image

VALUES = {"psnr": 21.5, "ssim": 0.5}
SETTINGS = {"weights": "ab", "seed": 0}


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)


def add(cache, name, sample, ground_truth, image, values, *, group="standard"):
    output = Output(name, sample, ground_truth, files.sha256_hex(image), None, 0.5, {group: values})
    cache.add([output], [image])


def find(cache, *place):
    """The standard metrics of an output."""
    found = cache.find(*place)
    return found and found.metrics["standard"]


@pytest.fixture
def folder(tmp_path):
    add(OutputCache(tmp_path / "m", SETTINGS), "crab", 0, "orig", image(), VALUES)
    return tmp_path / "m"


def test_only_the_same_output_is_found_by_the_next_run(folder):
    assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == VALUES
    assert np.array_equal(read_rgb(folder / "crab.png"), image())
    for settings in (SETTINGS | {"weights": "cd"}, SETTINGS | {"seed": 1}):
        assert find(OutputCache(folder, settings), "crab", 0, "orig") is None
    for other in (("bird", 0, "orig"), ("crab", 1, "orig"), ("crab", 0, "another")):
        assert find(OutputCache(folder, SETTINGS), *other) is None


def test_missing_damaged_or_changed_files_are_not_found(folder):
    path = folder / "crab.png"
    whole = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(whole[:50]), lambda: write(path, image(1))):
        spoil()
        assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") is None
    path.write_bytes(whole)
    assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == VALUES


def write(path, rgb):
    write_image(path, DecodedImage(rgb))


def test_partial_line_costs_only_its_own_output(folder):
    lines = folder / "scores.jsonl"
    add(OutputCache(folder, SETTINGS), "bird", 0, "o", image(1), VALUES)
    os.truncate(lines, lines.stat().st_size - 20)
    again = OutputCache(folder, SETTINGS)
    assert find(again, "crab", 0, "orig") == VALUES and find(again, "bird", 0, "o") is None
    add(again, "bird", 0, "o", image(1), VALUES)
    assert find(OutputCache(folder, SETTINGS), "bird", 0, "o") == VALUES
    lines.write_bytes(b'{"method": 3}\n[]\nnull\n\xff\n' + lines.read_bytes())
    assert find(OutputCache(folder, SETTINGS), "bird", 0, "o") == VALUES


def test_infinite_values_are_valid_json(tmp_path):
    add(OutputCache(tmp_path, SETTINGS), "flat", 0, "o", image(), {"psnr": math.inf, "ssim": 1.0})

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=fail)
    assert find(OutputCache(tmp_path, SETTINGS), "flat", 0, "o") == {"psnr": math.inf, "ssim": 1.0}


def test_metrics_accumulate_over_runs_and_processes(folder):
    """Each process writes its own file and reads all of them."""
    first, second = (OutputCache(folder, SETTINGS, process=process) for process in (1, 2))
    before = first.find("crab", 0, "orig")
    assert before.seconds == 0.5 and before.file is not None
    for cache, group in ((first, "lpips"), (second, "accuracy")):
        cache.add([dataclasses.replace(before, metrics={group: {group: 1.0}})], [None])
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "scores.1.jsonl",
        "scores.2.jsonl",
        "scores.jsonl",
    ]
    found = OutputCache(folder, SETTINGS, process=3).find("crab", 0, "orig")
    assert found.metrics == {"standard": VALUES, "lpips": {"lpips": 1.0}, "accuracy": {"accuracy": 1.0}}
    assert (found.pixels, found.file) == (before.pixels, before.file)


def test_of_two_outputs_in_two_files_the_one_on_disk_counts(folder):
    add(OutputCache(folder, SETTINGS, process=7), "crab", 0, "orig", image(1), {"psnr": 1.0})
    add(OutputCache(folder, SETTINGS), "crab", 0, "orig", image(2), {"psnr": 2.0})
    for other in (2, 1):  # the files are read in the order of their names, whichever was written last
        write(folder / "crab.png", image(other))
        assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == {"psnr": float(other)}
    cache = OutputCache(folder, SETTINGS)
    assert cache.find("crab", 0, "orig", pixels=files.sha256_hex(image(2))) is None
