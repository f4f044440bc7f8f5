"""The cache of outputs: which outputs are reused, and which are not."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from sr3_jax import files
from sr3_jax.errors import UserError
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


def test_outputs_are_found_by_the_next_run(folder):
    assert find(OutputCache(folder, SETTINGS), "crab", 0, "orig") == VALUES
    assert np.array_equal(read_rgb(folder / "crab.png"), image())


@pytest.mark.parametrize(
    ("settings", "name", "sample", "ground_truth"),
    [
        (SETTINGS | {"weights": "cd"}, "crab", 0, "orig"),
        (SETTINGS | {"seed": 1}, "crab", 0, "orig"),
        (SETTINGS, "bird", 0, "orig"),
        (SETTINGS, "crab", 1, "orig"),
        (SETTINGS, "crab", 0, "another"),
    ],
)
def test_other_outputs_are_not_found(folder, settings, name, sample, ground_truth):
    assert find(OutputCache(folder, settings), name, sample, ground_truth) is None


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


def test_the_latest_output_counts_and_samples_have_their_own_files(folder):
    cache = OutputCache(folder, SETTINGS)
    add(cache, "crab", 1, "orig", image(2), {"psnr": 1.0})
    add(cache, "crab", 0, "orig", image(3), {"psnr": 2.0})
    again = OutputCache(folder, SETTINGS)
    assert find(again, "crab", 1, "orig") == {"psnr": 1.0} and find(again, "crab", 0, "orig") == {"psnr": 2.0}
    assert sorted(path.name for path in folder.glob("*.png")) == ["crab.2.png", "crab.png"]


def test_infinite_values_are_valid_json(tmp_path):
    add(OutputCache(tmp_path, SETTINGS), "flat", 0, "o", image(), {"psnr": math.inf, "ssim": 1.0})

    def fail(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=fail)
    assert find(OutputCache(tmp_path, SETTINGS), "flat", 0, "o") == {"psnr": math.inf, "ssim": 1.0}


def test_hashes_depend_on_shape_dtype_and_values():
    arrays = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.int8)]
    arrays += [np.eye(2, 3, dtype=np.uint8)]
    assert len({files.sha256_hex(array) for array in arrays}) == 4
    assert files.sha256_hex(np.asfortranarray(arrays[3])) == files.sha256_hex(arrays[3])
    assert (
        files.sha256_hex({"a": 1, "b": 2}) == files.sha256_hex({"b": 2, "a": 1}) != files.sha256_hex({"a": 1})
    )


def test_file_names_are_safe_and_unique():
    taken = set()
    names = ["crab", "Crab", "crab", "../../etc/passwd", "a b\x00c", "翡翠 é", "翡" * 300, "翡" * 300, "..."]
    found = [files.unique_file_name(name, taken) for name in names]
    assert found[:6] == ["crab", "Crab_2", "crab_3", "etc_passwd", "a_b_c", "翡翠_é"] and found[8] == "image"
    assert (
        len({name.lower() for name in found}) == len(names)
        and max(len(name.encode()) for name in found) < 245
    )


def test_unwritable_folders_fail_with_their_path(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            files.make_folder(path)
    with pytest.raises(UserError, match=r"a\.json"):
        files.write_text(tmp_path / "none" / "a.json", "{}")
    with pytest.raises(UserError, match="file"):
        add(OutputCache(tmp_path / "file", SETTINGS), "crab", 0, "o", image(), VALUES)
    assert list(files.make_folder(tmp_path / "new" / "deep").iterdir()) == []


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


def test_metrics_without_an_image_file_are_found_by_the_hash(tmp_path):
    output = Output("crab", -5, "orig", "ab", metrics={"diversity": {"diversity": 3.0}})
    OutputCache(tmp_path, SETTINGS).add([output], [None])
    again = OutputCache(tmp_path, SETTINGS)
    assert again.find("crab", -5, "orig", pixels="ab") == output
    assert again.find("crab", -5, "orig", pixels="cd") is None
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
