"""Finished outputs are found again, and only if they are what they claim to be."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

from sr3_jax import outputs
from sr3_jax.aliases import UserError
from sr3_jax.outputs import Outputs
from sr3_jax.pictures import Picture, read_rgb, write_picture

SCORES = {"psnr": 21.5, "ssim": 0.5}
IDENTITY = {"weights": "ab", "seed": 0}


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)


@pytest.fixture
def kept(tmp_path):
    Outputs(tmp_path / "m", IDENTITY).keep("crab", 0, "orig", picture(), SCORES)
    return tmp_path / "m"


def test_what_was_kept_is_found_by_the_next_run(kept):
    assert Outputs(kept, IDENTITY).find("crab", 0, "orig") == SCORES
    assert np.array_equal(read_rgb(kept / "crab.png"), picture())


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
    assert Outputs(kept, identity).find(name, sample, original) is None


def test_a_picture_that_is_gone_damaged_or_changed_is_not_believed(kept):
    path = kept / "crab.png"
    whole = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(whole[:50]), lambda: write(path, picture(1))):
        spoil()
        assert Outputs(kept, IDENTITY).find("crab", 0, "orig") is None
    path.write_bytes(whole)
    assert Outputs(kept, IDENTITY).find("crab", 0, "orig") == SCORES


def write(path, rgb):
    write_picture(path, Picture(rgb))


def test_a_line_cut_in_half_costs_that_output_alone(kept):
    lines = kept / outputs.SCORES
    Outputs(kept, IDENTITY).keep("bird", 0, "o", picture(1), SCORES)
    os.truncate(lines, lines.stat().st_size - 20)
    again = Outputs(kept, IDENTITY)
    assert again.find("crab", 0, "orig") == SCORES and again.find("bird", 0, "o") is None
    again.keep("bird", 0, "o", picture(1), SCORES)
    assert Outputs(kept, IDENTITY).find("bird", 0, "o") == SCORES
    lines.write_bytes(b'{"identity": 3}\n[]\nnull\n\xff\n' + lines.read_bytes())
    assert Outputs(kept, IDENTITY).find("bird", 0, "o") == SCORES


def test_the_last_of_two_outputs_counts_and_samples_lie_side_by_side(kept):
    store = Outputs(kept, IDENTITY)
    store.keep("crab", 1, "orig", picture(2), {"psnr": 1.0})
    store.keep("crab", 0, "orig", picture(3), {"psnr": 2.0})
    again = Outputs(kept, IDENTITY)
    assert again.find("crab", 1, "orig") == {"psnr": 1.0} and again.find("crab", 0, "orig") == {"psnr": 2.0}
    assert sorted(path.name for path in kept.glob("*.png")) == ["crab.2.png", "crab.png"]


def test_an_infinite_score_survives_in_proper_json(tmp_path):
    Outputs(tmp_path, IDENTITY).keep("flat", 0, "o", picture(), {"psnr": math.inf, "ssim": 1.0})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / outputs.SCORES).read_text(), parse_constant=refuse)
    assert Outputs(tmp_path, IDENTITY).find("flat", 0, "o") == {"psnr": math.inf, "ssim": 1.0}


def test_digests_tell_shape_dtype_and_values_apart():
    arrays = [np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), np.zeros((2, 3), np.int8)]
    arrays += [np.eye(2, 3, dtype=np.uint8)]
    assert len({outputs.digest(array) for array in arrays}) == 4
    assert outputs.digest(np.asfortranarray(arrays[3])) == outputs.digest(arrays[3])
    assert outputs.digest({"a": 1, "b": 2}) == outputs.digest({"b": 2, "a": 1}) != outputs.digest({"a": 1})


def test_names_are_fit_for_files_and_unique():
    taken = set()
    names = ["crab", "Crab", "crab", "../../etc/passwd", "a b\x00c", "翡翠 é", "翡" * 300, "翡" * 300, "..."]
    found = [outputs.file_name(name, taken) for name in names]
    assert (
        found[:6] == ["crab", "Crab_2", "crab_3", "etc_passwd", "a_b_c", "翡翠_é"] and found[8] == "picture"
    )
    assert (
        len({name.lower() for name in found}) == len(names)
        and max(len(name.encode()) for name in found) < 245
    )


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*(name a folder|another folder)"):
            outputs.open_folder(path)
    with pytest.raises(UserError, match="cannot be written"):
        outputs.write_text(tmp_path / "none" / "a.json", "{}")
    with pytest.raises(UserError, match="cannot be written"):
        Outputs(tmp_path / "file", IDENTITY).keep("crab", 0, "o", picture(), SCORES)
    assert list(outputs.open_folder(tmp_path / "new" / "deep").iterdir()) == []
