"""Contact sheets of generated images: grid.png, by label, and stages.png, the same images stage by stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from sr3_jax.errors import UserError
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.cascade import CascadeJob, image_path

LEAST, MOST = 64, 256  # smallest and largest side of a shown image, in pixels
ROWS, COLUMNS = 10, 10
SHOWN = 8  # images of stages.png


def write(job: CascadeJob, folder: Path) -> list[str]:
    """Write the sheets into the folder.

    Returns:
        Their file names.
    """
    pages = {"grid.png": _grid(job, folder)}
    kept = (
        image_path(folder, job, number, index).is_file()
        for number in range(len(job.stages))
        for index in range(min(job.count, SHOWN))
    )
    # When a finished command is run again, the images of earlier stages may be gone, but their sheet is there.
    if (len(job.stages) > 1 or job.low_res is not None) and all(kept):
        pages["stages.png"] = _stages(job, folder)
    for name, page in pages.items():
        try:
            write_image(folder / name, DecodedImage(page))
        except ImageError as error:
            raise UserError(f"{folder / name} {error}") from error
    return list(pages)


def _image(job: CascadeJob, folder: Path, number: int, index: int) -> np.ndarray:
    if number < 0:
        assert job.low_res is not None
        return job.low_res[index]
    return read_rgb(image_path(folder, job, number, index))


def _sized(image: np.ndarray, least: int = LEAST) -> np.ndarray:
    """Enlarged by nearest neighbor if it is small, shrunk if it is large."""
    if max(image.shape[:2]) > MOST:
        small = PillowImage.fromarray(image)
        small.thumbnail((MOST, MOST))
        return np.asarray(small)
    factor = -(-least // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _grid(job: CascadeJob, folder: Path) -> np.ndarray:
    """One row per label; without labels, all images in rows of COLUMNS."""
    last = len(job.stages) - 1
    if job.labels is None:
        shown = list(range(min(job.count, ROWS * COLUMNS)))
        rows = {start: shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)}
        titles = []
    else:
        rows = {
            label: np.flatnonzero(job.labels == label)[:COLUMNS].tolist()
            for label in sorted(set(job.labels.tolist()))[:ROWS]
        }
        titles = [f"label {label}" for label in rows]
    cells = [[_sized(_image(job, folder, last, index)) for index in row] for row in rows.values()]
    return image_grid(cells, column_titles=[], row_titles=titles)


def _stages(job: CascadeJob, folder: Path) -> np.ndarray:
    first = 0 if job.low_res is None else -1
    numbers = range(first, len(job.stages))
    rows = [
        [_sized(_image(job, folder, number, index), 2 * LEAST) for number in numbers]
        for index in range(min(job.count, SHOWN))
    ]
    titles = ["low-res" if number < 0 else job.stages[number].name for number in numbers]
    labels = [] if job.labels is None else [f"label {label}" for label in job.labels[:SHOWN]]
    return image_grid(rows, column_titles=titles, row_titles=labels)
