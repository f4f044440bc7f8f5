"""The pages of what a cascade drew: grid.png, by label, and stages.png, the same images stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from sr3_jax.errors import UserError
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.cascade import CascadeJob, image_path

LEAST, MOST = 64, 256  # pixels of an image that is shown
ROWS, COLUMNS = 10, 10
SHOWN = 8  # images of stages.png


def write(run: CascadeJob, folder: Path) -> list[str]:
    """Write the pages; their names."""
    pages = {"grid.png": _grid(run, folder)}
    kept = (
        image_path(folder, run, number, index).is_file()
        for number in range(len(run.links))
        for index in range(min(run.count, SHOWN))
    )
    # A finished run that is given again may have no images of its stages any more, but has its page.
    if (len(run.links) > 1 or run.low_res is not None) and all(kept):
        pages["stages.png"] = _stages(run, folder)
    for name, page in pages.items():
        try:
            write_image(folder / name, DecodedImage(page))
        except ImageError as error:
            raise UserError(f"{folder / name} {error}") from error
    return list(pages)


def _image(run: CascadeJob, folder: Path, number: int, index: int) -> np.ndarray:
    if number < 0:
        assert run.low_res is not None
        return run.low_res[index]
    return read_rgb(image_path(folder, run, number, index))


def _sized(image: np.ndarray, least: int = LEAST) -> np.ndarray:
    """Enlarged pixel by pixel where it is small, shrunk where it is large."""
    if max(image.shape[:2]) > MOST:
        small = PillowImage.fromarray(image)
        small.thumbnail((MOST, MOST))
        return np.asarray(small)
    factor = -(-least // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _grid(run: CascadeJob, folder: Path) -> np.ndarray:
    """A row for each label, or rows of all images where there are none."""
    last = len(run.links) - 1
    if run.labels is None:
        shown = list(range(min(run.count, ROWS * COLUMNS)))
        rows = {start: shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)}
        titles = []
    else:
        rows = {
            label: np.flatnonzero(run.labels == label)[:COLUMNS].tolist()
            for label in sorted(set(run.labels.tolist()))[:ROWS]
        }
        titles = [f"label {label}" for label in rows]
    cells = [[_sized(_image(run, folder, last, index)) for index in row] for row in rows.values()]
    return image_grid(cells, column_titles=[], row_titles=titles)


def _stages(run: CascadeJob, folder: Path) -> np.ndarray:
    first = 0 if run.low_res is None else -1
    numbers = range(first, len(run.links))
    rows = [
        [_sized(_image(run, folder, number, index), 2 * LEAST) for number in numbers]
        for index in range(min(run.count, SHOWN))
    ]
    titles = ["given" if number < 0 else run.links[number].name for number in numbers]
    labels = [] if run.labels is None else [f"label {label}" for label in run.labels[:SHOWN]]
    return image_grid(rows, column_titles=titles, row_titles=labels)
