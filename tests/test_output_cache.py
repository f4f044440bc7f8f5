"""Finished outputs are found again, and only if they are what they claim to be."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from sr3_jax import files
from sr3_jax.errors import UserError
from sr3_jax.evaluation.outputs import Kept, Outputs, Record
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image

SCORES = {"psnr": 21.5, "ssim": 0.5}
IDENTITY = {"weights": "ab", "seed": 0}


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)


def keep(store, name, sample, original, image, scores, *, measure="plain"):
    about = Kept(files.sha256_hex(image), None, 0.5, {measure: scores})
    store.keep([Record(name, sample, original, image, about)])


def find(store, *output):
    """The plain scores of an output."""
    found = store.find(*output)
    return found and found.measures["plain"]


@pytest.fixture
def kept(tmp_path):
    keep(Outputs(tmp_path / "m", IDENTITY), "crab", 0, "orig", image(), SCORES)
    return tmp_path / "m"


def test_what_was_kept_is_found_by_the_next_run(kept):
    assert find(Outputs(kept, IDENTITY), "crab", 0, "orig") == SCORES
    assert np.array_equal(read_rgb(kept / "crab.png"), image())


@pytest.mark.parametrize(
    ("identity", "name", "sample", "original"),
    [
        (IDENTITY | {"weights": "cd"}, "crab", 0, "orig"),
        (IDENTITY | {"seed": 1}, "crab", 0, "orig"),
        (IDENTITY, "bird", 0, "orig"),
        (IDENTITY, "crab", 1, "orig"),
        (IDENTITY, "crab", 0, "another"),
    ],
)
def test_what_is_not_the_same_is_not_found(kept, identity, name, sample, original):
    assert find(Outputs(kept, identity), name, sample, original) is None


def test_a_image_that_is_gone_damaged_or_changed_is_not_believed(kept):
    path = kept / "crab.png"
    whole = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(whole[:50]), lambda: write(path, image(1))):
        spoil()
        assert find(Outputs(kept, IDENTITY), "crab", 0, "orig") is None
    path.write_bytes(whole)
    assert find(Outputs(kept, IDENTITY), "crab", 0, "orig") == SCORES


def write(path, rgb):
    write_image(path, DecodedImage(rgb))


def test_a_line_cut_in_half_costs_that_output_alone(kept):
    lines = kept / "scores.jsonl"
    keep(Outputs(kept, IDENTITY), "bird", 0, "o", image(1), SCORES)
    os.truncate(lines, lines.stat().st_size - 20)
    again = Outputs(kept, IDENTITY)
    assert find(again, "crab", 0, "orig") == SCORES and find(again, "bird", 0, "o") is None
    keep(again, "bird", 0, "o", image(1), SCORES)
    assert find(Outputs(kept, IDENTITY), "bird", 0, "o") == SCORES
    lines.write_bytes(b'{"identity": 3}\n[]\nnull\n\xff\n' + lines.read_bytes())
    assert find(Outputs(kept, IDENTITY), "bird", 0, "o") == SCORES


def test_the_last_of_two_outputs_counts_and_samples_lie_side_by_side(kept):
    store = Outputs(kept, IDENTITY)
    keep(store, "crab", 1, "orig", image(2), {"psnr": 1.0})
    keep(store, "crab", 0, "orig", image(3), {"psnr": 2.0})
    again = Outputs(kept, IDENTITY)
    assert find(again, "crab", 1, "orig") == {"psnr": 1.0} and find(again, "crab", 0, "orig") == {"psnr": 2.0}
    assert sorted(path.name for path in kept.glob("*.png")) == ["crab.2.png", "crab.png"]


def test_an_infinite_score_survives_in_proper_json(tmp_path):
    keep(Outputs(tmp_path, IDENTITY), "flat", 0, "o", image(), {"psnr": math.inf, "ssim": 1.0})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "scores.jsonl").read_text(), parse_constant=refuse)
    assert find(Outputs(tmp_path, IDENTITY), "flat", 0, "o") == {"psnr": math.inf, "ssim": 1.0}


def test_digests_tell_shape_dtype_and_values_apart():
    arrays = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.int8)]
    arrays += [np.eye(2, 3, dtype=np.uint8)]
    assert len({files.sha256_hex(array) for array in arrays}) == 4
    assert files.sha256_hex(np.asfortranarray(arrays[3])) == files.sha256_hex(arrays[3])
    assert (
        files.sha256_hex({"a": 1, "b": 2}) == files.sha256_hex({"b": 2, "a": 1}) != files.sha256_hex({"a": 1})
    )


def test_names_are_fit_for_files_and_unique():
    taken = set()
    names = ["crab", "Crab", "crab", "../../etc/passwd", "a b\x00c", "翡翠 é", "翡" * 300, "翡" * 300, "..."]
    found = [files.file_name(name, taken) for name in names]
    assert found[:6] == ["crab", "Crab_2", "crab_3", "etc_passwd", "a_b_c", "翡翠_é"] and found[8] == "image"
    assert (
        len({name.lower() for name in found}) == len(names)
        and max(len(name.encode()) for name in found) < 245
    )


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*(name a folder|another folder)"):
            files.make_folder(path)
    with pytest.raises(UserError, match="cannot be written"):
        files.write_text(tmp_path / "none" / "a.json", "{}")
    with pytest.raises(UserError, match="cannot be written"):
        keep(Outputs(tmp_path / "file", IDENTITY), "crab", 0, "o", image(), SCORES)
    assert list(files.make_folder(tmp_path / "new" / "deep").iterdir()) == []


def test_measures_add_up_over_runs_and_processes(kept):
    """Each process has a file of its own, and all read all."""
    first, second = (Outputs(kept, IDENTITY, process=process) for process in (1, 2))
    about = first.find("crab", 0, "orig")
    assert about.seconds == 0.5 and about.file is not None
    for store, measure in ((first, "lpips"), (second, "recognition")):
        more = dataclasses.replace(about, measures={measure: {measure: 1.0}})
        store.keep([Record("crab", 0, "orig", None, more)])
    assert sorted(path.name for path in kept.glob("*.jsonl")) == [
        "scores.1.jsonl",
        "scores.2.jsonl",
        "scores.jsonl",
    ]
    found = Outputs(kept, IDENTITY, process=3).find("crab", 0, "orig")
    assert found.measures == {"plain": SCORES, "lpips": {"lpips": 1.0}, "recognition": {"recognition": 1.0}}
    assert (found.output, found.file) == (about.output, about.file)


def test_of_one_output_in_two_files_the_one_that_is_there_counts(kept):
    keep(Outputs(kept, IDENTITY, process=7), "crab", 0, "orig", image(1), {"psnr": 1.0})
    keep(Outputs(kept, IDENTITY), "crab", 0, "orig", image(2), {"psnr": 2.0})
    for other in (2, 1):
        Outputs(kept, IDENTITY)  # files are read in the order of their names, whatever was written last
        write(kept / "crab.png", image(other))
        assert find(Outputs(kept, IDENTITY), "crab", 0, "orig") == {"psnr": float(other)}
    store = Outputs(kept, IDENTITY)
    assert store.find("crab", 0, "orig", output=files.sha256_hex(image(2))) is None


def test_what_has_no_image_is_known_by_its_line(tmp_path):
    line = Kept("ab", None, None, {"spread": {"diversity": 3.0}})
    Outputs(tmp_path, IDENTITY).keep([Record("crab", -5, "orig", None, line)])
    again = Outputs(tmp_path, IDENTITY)
    assert again.find("crab", -5, "orig", output="ab") == line
    assert again.find("crab", -5, "orig", output="cd") is None
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
