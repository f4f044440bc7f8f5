"""Image grids: cells, their sizes and titles; which images are shown, and which window of them."""

import numpy as np
import pytest

from sr3_jax.evaluation.runner import select_images
from sr3_jax.image_io import grid
from sr3_jax.image_io.grid import image_grid


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_cells_are_enlarged_by_nearest_neighbor():
    small, large = noise(4, 16, 16, 3), noise(5, 64, 64, 3)
    made = image_grid([[small, large]], column_titles=[])
    assert made.dtype == np.uint8 and made.shape == (68, 134, 3)
    np.testing.assert_array_equal(made[2:66, 2:66], small.repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_array_equal(made[2:66, 68:132], large)
    assert (made[:2] == 255).all() and (made[:, 66:68] == 255).all()


def test_titles_are_visible_and_do_not_overlap_cells():
    cell = np.zeros((24, 120, 3), np.uint8) + np.array([10, 200, 30], np.uint8)
    bare = image_grid([[cell, cell]], column_titles=["", ""])
    titled = image_grid([[cell, cell]], column_titles=["low-res", "shipped model"], row_titles=["coffee"])
    assert titled.shape[0] > bare.shape[0] and titled.shape[1] > bare.shape[1]
    green = (titled == cell[0, 0]).all(axis=2)
    rows, columns = np.nonzero(green)
    assert green.sum() == 2 * 24 * 120  # nothing overlaps a cell
    assert (titled[: rows.min()] < 64).any()  # column titles above
    assert (titled[:, : columns.min()] < 64).any()  # row titles on the left


def test_rows_and_cells_may_have_any_shape():
    def images(*shapes):
        return [noise(6, *shape) for shape in shapes]

    rows = [
        images((37, 91, 3), (148, 364, 3), (5, 5, 1)),
        [],
        images((1, 1, 3)),
        images((1, 300, 3), (300, 1, 3)),
    ]
    made = image_grid(rows, column_titles=["a\nb", "", "c", "d", "e"], row_titles=["Ł", ""])
    assert made.ndim == 3 and made.shape[2] == 3
    assert image_grid([], column_titles=[]).ndim == 3


@pytest.mark.parametrize(
    "cell", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)]
)
def test_invalid_cells_fail(cell):
    with pytest.raises(ValueError, match=f"{cell.dtype} .*{cell.shape[-1]}"):
        image_grid([[cell]], column_titles=["a"])


def test_worst_median_and_best_images_are_selected():
    assert select_images(np.array([22.0, 30.0, 18.0, 25.0, 21.0])) == {
        "worst": 2,
        "median": 0,
        "best": 1,
    }
    assert select_images(np.array([22.0, np.inf, 18.0, 25.0])) == {"worst": 2, "median": 0, "best": 1}
    assert select_images(np.array([5.0, 4.0])) == {"worst": 1, "best": 0}
    assert select_images(np.array([5.0])) == {"only": 0}


def test_small_images_are_shown_whole():
    image = np.zeros((200, 256, 3), np.uint8)
    assert grid.detail_window(image, image, multiple=4) == (slice(0, 200), slice(0, 256))


@pytest.mark.parametrize(("top", "left"), [(0, 0), (300, 12), (604, 404), (333, 217)])
def test_window_covers_the_largest_error_of_bicubic(top, left):
    bicubic = np.full((800, 600, 3), 90, np.uint8)
    bicubic[:100] = 255  # strong, but without error
    ground_truth = bicubic - 1  # a small error everywhere
    ground_truth[top : top + 180, left : left + 180] -= 7
    rows, columns = grid.detail_window(ground_truth, bicubic, multiple=4)
    assert rows.stop - rows.start == columns.stop - columns.start == grid.WINDOW
    assert rows.start % 4 == columns.start % 4 == 0
    assert 0 <= rows.start <= top and top + 180 <= rows.stop <= 800
    assert 0 <= columns.start <= left and left + 180 <= columns.stop <= 600


def test_window_of_a_narrow_image_is_narrow():
    ground_truth = np.zeros((48, 1000, 3), np.uint8)
    ground_truth[:, 500:520] = 9
    rows, columns = grid.detail_window(ground_truth, np.zeros_like(ground_truth), multiple=8)
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
    cells = grid.grid_row(ground_truth, low_res, bicubic, outputs)
    assert [cell.shape[:2] for cell in cells] == [(48, 48), (192, 192), (24, 24), *[(192, 192)] * 4][:7]
    corners = {tuple(cell[0, 0, :2]) for cell in cells}
    assert len(corners) == 1 and corners != {(0, 0)}
