"""Which images of an evaluation to look at, and which part of them: pure, host side.

Shape legend: P images, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sr3_jax.image_io.grid import image_grid

WHOLE = 256  # pixels; a larger image is shown in part, at its own size
PART = 192


def chosen(psnr: np.ndarray) -> dict[str, int]:
    """{'worst', 'median', 'best'} -> index by psnr [P]; the first and the last of two, the only one of one."""
    order = np.argsort(psnr, kind="stable")
    picks = {"worst": int(order[0]), "median": int(order[(len(order) - 1) // 2]), "best": int(order[-1])}
    if len(order) == 1:
        return {"only": picks["worst"]}
    return picks if len(order) > 2 else {name: picks[name] for name in ("worst", "best")}


def detail_window(original: np.ndarray, bicubic: np.ndarray, *, multiple: int) -> tuple[slice, slice]:
    """The rows and columns to show of an image uint8 [H,W,3]: all of a small one, else PART x PART.

    Of a large one the window where bicubic interpolation lost most (squared error), which is where methods
    can differ: the image's finest structure rather than its strongest edge. It starts and ends at multiples
    of `multiple`, so that it has an exact low-res window.
    """
    height, width = original.shape[:2]
    if max(height, width) <= WHOLE:
        return slice(0, height), slice(0, width)
    part = max(1, PART // multiple) * multiple
    sides = (min(part, height // multiple * multiple), min(part, width // multiple * multiple))
    lost = np.square(original.astype(np.float64) - bicubic).sum(axis=2)
    sums = np.pad(lost.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))  # of all above and left
    tops = np.arange(0, height - sides[0] + 1, multiple)
    lefts = np.arange(0, width - sides[1] + 1, multiple)
    bottoms, rights = tops + sides[0], lefts + sides[1]
    inside = (
        sums[np.ix_(bottoms, rights)]
        - sums[np.ix_(tops, rights)]
        - sums[np.ix_(bottoms, lefts)]
        + sums[np.ix_(tops, lefts)]
    )
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    top, left = int(tops[row]), int(lefts[column])
    return slice(top, top + sides[0]), slice(left, left + sides[1])


def grid_row(
    original: np.ndarray,
    low_res: Mapping[int, np.ndarray],
    bicubic: Mapping[int, np.ndarray],
    outputs: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The cells of one image: low-res and bicubic of each scale, the outputs, the original: one window of all.

    All are uint8 [H,W,3] of their own sizes, which share the top left corner; `low_res` and `bicubic` by scale.
    """
    multiple = math.lcm(*low_res)
    images = [original, *bicubic.values(), *outputs]
    height, width = (min(image.shape[axis] for image in images) for axis in (0, 1))
    height, width = height // multiple * multiple, width // multiple * multiple
    first = next(iter(bicubic.values()))
    rows, columns = detail_window(original[:height, :width], first[:height, :width], multiple=multiple)
    cells = []
    for scale, small in low_res.items():
        at = [slice(side.start // scale, side.stop // scale) for side in (rows, columns)]
        cells += [small[at[0], at[1]], bicubic[scale][rows, columns]]
    return [*cells, *(output[rows, columns] for output in outputs), original[rows, columns]]


def grid(
    rows: Mapping[str, Sequence[np.ndarray]], *, scales: Sequence[int], output_titles: Sequence[str]
) -> np.ndarray:
    """The titled image uint8 [H,W,3] of `grid_row`s by their title."""
    suffixes = {scale: f" {scale}x" if len(scales) > 1 else "" for scale in scales}
    inputs = [f"{name}{suffix}" for suffix in suffixes.values() for name in ("low-res", "bicubic")]
    columns = [*inputs, *output_titles, "original"]
    return image_grid(list(rows.values()), column_titles=columns, row_titles=list(rows))
