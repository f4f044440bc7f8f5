"""The pages of what a cascade drew: grid.png, by label, and stages.png, the same pictures stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sr3_jax.cascade import Run, picture_path
from sr3_jax.images import picture_grid
from sr3_jax.pictures import Picture, read_rgb, write_picture

LEAST = 64  # pixels; smaller pictures are shown enlarged, pixel by pixel
ROWS, COLUMNS = 10, 10
SHOWN = 8  # pictures of stages.png


def write(run: Run, folder: Path) -> list[str]:
    """Write the pages; their names."""
    pages = {"grid.png": _grid(run, folder)}
    if len(run.links) > 1 or run.low_res is not None:
        pages["stages.png"] = _stages(run, folder)
    for name, page in pages.items():
        write_picture(folder / name, Picture(page))
    return list(pages)


def _picture(run: Run, folder: Path, number: int, index: int) -> np.ndarray:
    if number < 0:
        assert run.low_res is not None
        return run.low_res[index]
    return read_rgb(picture_path(folder, run, number, index))


def _enlarged(picture: np.ndarray, least: int = LEAST) -> np.ndarray:
    factor = -(-least // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _grid(run: Run, folder: Path) -> np.ndarray:
    """A row for each label, or rows of all pictures where there are none."""
    last = len(run.links) - 1
    if run.labels is None:
        shown = list(range(min(run.count, ROWS * COLUMNS)))
        rows = {start: shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)}
        titles = []
    else:
        rows = {
            label: np.flatnonzero(run.labels == label)[:COLUMNS].tolist()
            for label in sorted(set(run.labels.tolist()))
        }
        titles = [f"label {label}" for label in rows]
    cells = [[_enlarged(_picture(run, folder, last, index)) for index in row] for row in rows.values()]
    return picture_grid(cells, column_titles=[], row_titles=titles)


def _stages(run: Run, folder: Path) -> np.ndarray:
    first = 0 if run.low_res is None else -1
    numbers = range(first, len(run.links))
    rows = [
        [_enlarged(_picture(run, folder, number, index), 2 * LEAST) for number in numbers]
        for index in range(min(run.count, SHOWN))
    ]
    titles = ["given" if number < 0 else run.links[number].name for number in numbers]
    labels = [] if run.labels is None else [f"label {label}" for label in run.labels[:SHOWN]]
    return picture_grid(rows, column_titles=titles, row_titles=labels)
