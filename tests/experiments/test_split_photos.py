"""Whole photographs are held out and cut into tiles, and into squares that train and test a classifier."""

from __future__ import annotations

import hashlib
import string

import numpy as np
import pytest
from PIL import Image

from experiments import split_photos


def split(folder, out, *options):
    return split_photos.main([str(folder), str(out), *options])


@pytest.fixture
def photographs(tmp_path):
    """Every pixel encodes its position: red the column, green the row, blue the photograph."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rows, columns = np.mgrid[:72, :104]
    for number in range(5):
        image = np.stack([2 * columns, 3 * rows, np.full_like(rows, 50 * number)], axis=-1)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"photo{number}.png")
    return folder


def opened(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_whole_photographs_are_held_out_at_half_their_size(photographs, tmp_path):
    assert split(photographs, tmp_path / "out", "--hold-out=2", "--side=16", "--tiles=4") == 0
    trained = {path.stem for path in (tmp_path / "out" / "train").iterdir()}
    tiles = sorted((tmp_path / "out" / "tiles").iterdir())
    held_out = {path.stem.rpartition("-")[0] for path in tiles}
    assert (len(trained), len(held_out), len(tiles)) == (3, 2, 8) and not trained & held_out
    # 52x36 pixels at half the size are 3 x 2 tiles of 16; evenly spaced ones are the 1st, 2nd, 4th and 5th.
    for path, (row, column) in zip(tiles[:4], [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        tile = opened(path)
        assert tile.shape == (16, 16, 3)
        red = np.round(2 * (2 * (16 * column + np.arange(16)) + 0.5))
        assert np.abs(tile[0, :, 0] - red).max() <= 1
        assert abs(tile[0, 0, 1] - 3 * (32 * row + 0.5)) <= 1


def test_training_and_test_squares_of_the_classifier_form_a_chessboard(photographs, tmp_path):
    assert split(photographs, tmp_path / "out", "--hold-out=2", "--side=16") == 0
    places = {}
    for name in ("gallery", "probe"):
        for path in sorted((tmp_path / "out" / name).rglob("*.png")):
            patch = opened(path)
            assert patch.shape == (8, 8, 3) and path.stem.startswith(path.parent.name)
            where = (
                path.parent.name,
                round((patch[0, 0, 1] / 3 - 0.5) / 16),
                round((patch[0, 0, 0] / 2 - 0.5) / 16),
            )
            places.setdefault(name, set()).add(where)
    fields = {(row, column) for row in range(4) for column in range(6)}
    for photograph in {of for of, _, _ in places["gallery"]}:
        black, white = (
            {(r, c) for of, r, c in places[name] if of == photograph} for name in ("gallery", "probe")
        )
        assert black == {(r, c) for r, c in fields if (r + c) % 2 == 0} and white == fields - black


def test_a_small_photograph_is_not_downscaled(photographs, tmp_path):
    assert split(photographs, tmp_path / "out", "--hold-out=1", "--side=24", "--tiles=99") == 0
    tiles = list((tmp_path / "out" / "tiles").iterdir())
    assert len(tiles) == 12 and opened(tiles[0]).shape == (
        24,
        24,
        3,
    )  # of 104x72; at half the size only 2 fit


@pytest.mark.parametrize("other", ["photo0.jpg", "deeper/photo0.png", "PHOTO0.png"])
def test_names_whose_tiles_would_collide_fail(photographs, tmp_path, capsys, other):
    (photographs / other).parent.mkdir(exist_ok=True)
    Image.open(photographs / "photo0.png").save(photographs / other)
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.png").touch()
    assert split(photographs, tmp_path / "out", "--hold-out=2", "--side=16") == 2
    error = capsys.readouterr().err
    assert "photo0" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "train" / "mine.png").exists()


def test_a_long_name_fails_only_for_a_held_out_photograph(photographs, tmp_path, capsys):
    names = [letter * 58 + ".png" for letter in string.ascii_letters]
    first, *_, last = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    for name, code in ((last, 0), (first, 2)):
        Image.open(photographs / "photo0.png").save(photographs / name)
        assert split(photographs, tmp_path / "out", "--hold-out=1", "--side=16") == code
        assert (first in capsys.readouterr().err) == bool(code)


def test_large_photographs_give_forty_squares(photographs, tmp_path):
    (photographs / "big.png").parent.mkdir(exist_ok=True)
    for number in range(5):
        Image.new("RGB", (160, 200), (number, 0, 0)).save(photographs / f"photo{number}.png")
    assert split(photographs, tmp_path / "out", "--hold-out=1", "--side=16") == 0
    # Half the size has 10 x 12 squares of 8 pixels, half of them black.
    assert [len(list((tmp_path / "out" / name).rglob("*.png"))) for name in ("gallery", "probe")] == [40, 40]


def test_too_few_photographs_fail(photographs, tmp_path, capsys):
    assert split(photographs, tmp_path / "out", "--hold-out=5", "--side=16") == 2
    error = capsys.readouterr().err
    assert "--hold-out 5" in error and error.count("\n") == 1
