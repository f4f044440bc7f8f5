"""Image grids: cells, their sizes, and titles."""

import numpy as np
import pytest

from sr3_jax.image_io.grid import image_grid


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_cells_are_enlarged_by_nearest_neighbor():
    small, large = noise(4, 16, 16, 3), noise(5, 64, 64, 3)
    grid = image_grid([[small, large]], column_titles=[])
    assert grid.dtype == np.uint8 and grid.shape == (68, 134, 3)
    np.testing.assert_array_equal(grid[2:66, 2:66], small.repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_array_equal(grid[2:66, 68:132], large)
    assert (grid[:2] == 255).all() and (grid[:, 66:68] == 255).all()


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
    grid = image_grid(rows, column_titles=["a\nb", "", "c", "d", "e"], row_titles=["Ł", ""])
    assert grid.ndim == 3 and grid.shape[2] == 3
    assert image_grid([], column_titles=[]).ndim == 3


@pytest.mark.parametrize(
    "cell", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)]
)
def test_invalid_cells_fail(cell):
    with pytest.raises(ValueError, match=f"{cell.dtype} .*{cell.shape[-1]}"):
        image_grid([[cell]], column_titles=["a"])
