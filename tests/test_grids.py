"""What is shown of an evaluation: which images, which part, and cells that fit each other."""

from __future__ import annotations

import numpy as np
import pytest

from sr3_jax.evaluation import showcase


def test_worst_median_and_best():
    assert showcase.chosen(np.array([22.0, 30.0, 18.0, 25.0, 21.0])) == {"worst": 2, "median": 0, "best": 1}
    assert showcase.chosen(np.array([22.0, np.inf, 18.0, 25.0])) == {"worst": 2, "median": 0, "best": 1}
    assert showcase.chosen(np.array([5.0, 4.0])) == {"worst": 1, "best": 0}
    assert showcase.chosen(np.array([5.0])) == {"only": 0}


def test_a_small_image_is_shown_whole():
    image = np.zeros((200, 256, 3), np.uint8)
    assert showcase.detail_window(image, image, multiple=4) == (slice(0, 200), slice(0, 256))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (300, 12), (604, 404), (333, 217)])
def test_the_window_holds_what_bicubic_lost(top, left):
    bicubic = np.full((800, 600, 3), 90, np.uint8)
    bicubic[:100] = 255  # strong, but not lost
    original = bicubic - 1  # lost a little everywhere
    original[top : top + 180, left : left + 180] -= 7
    rows, columns = showcase.detail_window(original, bicubic, multiple=4)
    assert rows.stop - rows.start == columns.stop - columns.start == showcase.PART
    assert rows.start % 4 == columns.start % 4 == 0
    assert 0 <= rows.start <= top and top + 180 <= rows.stop <= 800
    assert 0 <= columns.start <= left and left + 180 <= columns.stop <= 600


def test_a_narrow_image_has_a_narrow_window():
    original = np.zeros((48, 1000, 3), np.uint8)
    original[:, 500:520] = 9
    rows, columns = showcase.detail_window(original, np.zeros_like(original), multiple=8)
    assert rows == slice(0, 48) and columns.start <= 500 and columns.stop >= 520


def test_all_cells_of_a_row_show_the_same_place():
    """Each image tells its place in its colours: row number in red, column number in green."""

    def places(height, width, step):
        grid = np.zeros((height, width, 3), np.uint8)
        grid[..., 0] = (np.arange(height) * step // 4)[:, None]
        grid[..., 1] = np.arange(width) * step // 4
        return grid

    original = places(400, 600, 1)
    original[250:350, 300:400, 2] = 200
    low_res = {4: places(100, 150, 4), 8: places(50, 75, 8)}
    bicubic = {4: places(400, 600, 1), 8: places(400, 600, 1)}
    outputs = [places(400, 600, 1), places(396, 600, 1)]
    cells = showcase.grid_row(original, low_res, bicubic, outputs)
    assert [cell.shape[:2] for cell in cells] == [(48, 48), (192, 192), (24, 24), *[(192, 192)] * 4][:7]
    corners = {tuple(cell[0, 0, :2]) for cell in cells}
    assert len(corners) == 1 and corners != {(0, 0)}


def test_the_grid_names_scales_only_where_there_are_two():
    cell = np.zeros((16, 16, 3), np.uint8)
    narrow = showcase.grid({"worst": [cell] * 4}, scales=[4], output_titles=["m"])
    wide = showcase.grid({"worst": [cell] * 6}, scales=[4, 8], output_titles=["m"])
    assert narrow.dtype == np.uint8 and wide.shape[1] > narrow.shape[1]
