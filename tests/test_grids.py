"""Image grids: which images are shown, which window of them, and cells that show the same place."""

from __future__ import annotations

import numpy as np
import pytest

from sr3_jax.evaluation import grids


def test_worst_median_and_best_images_are_selected():
    assert grids.select_images(np.array([22.0, 30.0, 18.0, 25.0, 21.0])) == {
        "worst": 2,
        "median": 0,
        "best": 1,
    }
    assert grids.select_images(np.array([22.0, np.inf, 18.0, 25.0])) == {"worst": 2, "median": 0, "best": 1}
    assert grids.select_images(np.array([5.0, 4.0])) == {"worst": 1, "best": 0}
    assert grids.select_images(np.array([5.0])) == {"only": 0}


def test_small_images_are_shown_whole():
    image = np.zeros((200, 256, 3), np.uint8)
    assert grids.detail_window(image, image, multiple=4) == (slice(0, 200), slice(0, 256))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (300, 12), (604, 404), (333, 217)])
def test_window_covers_the_largest_error_of_bicubic(top, left):
    bicubic = np.full((800, 600, 3), 90, np.uint8)
    bicubic[:100] = 255  # strong, but without error
    ground_truth = bicubic - 1  # a small error everywhere
    ground_truth[top : top + 180, left : left + 180] -= 7
    rows, columns = grids.detail_window(ground_truth, bicubic, multiple=4)
    assert rows.stop - rows.start == columns.stop - columns.start == grids.WINDOW
    assert rows.start % 4 == columns.start % 4 == 0
    assert 0 <= rows.start <= top and top + 180 <= rows.stop <= 800
    assert 0 <= columns.start <= left and left + 180 <= columns.stop <= 600


def test_window_of_a_narrow_image_is_narrow():
    ground_truth = np.zeros((48, 1000, 3), np.uint8)
    ground_truth[:, 500:520] = 9
    rows, columns = grids.detail_window(ground_truth, np.zeros_like(ground_truth), multiple=8)
    assert rows == slice(0, 48) and columns.start <= 500 and columns.stop >= 520


def test_all_cells_of_a_row_show_the_same_window():
    """Each pixel encodes its place: row number in red, column number in green."""

    def places(height, width, step):
        grid = np.zeros((height, width, 3), np.uint8)
        grid[..., 0] = (np.arange(height) * step // 4)[:, None]
        grid[..., 1] = np.arange(width) * step // 4
        return grid

    ground_truth = places(400, 600, 1)
    ground_truth[250:350, 300:400, 2] = 200
    low_res = {4: places(100, 150, 4), 8: places(50, 75, 8)}
    bicubic = {4: places(400, 600, 1), 8: places(400, 600, 1)}
    outputs = [places(400, 600, 1), places(396, 600, 1)]
    cells = grids.grid_row(ground_truth, low_res, bicubic, outputs)
    assert [cell.shape[:2] for cell in cells] == [(48, 48), (192, 192), (24, 24), *[(192, 192)] * 4][:7]
    corners = {tuple(cell[0, 0, :2]) for cell in cells}
    assert len(corners) == 1 and corners != {(0, 0)}
