"""Titled grids of images, to look at, and which part of large images they show. On the host, with NumPy and Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

GUTTER = 2  # pixels between cells
FONT_SIZE = 12  # pixels
MAX_WHOLE = 256  # pixels; of larger images a window is shown at full size
WINDOW = 192


def image_grid(
    rows: Sequence[Sequence[np.ndarray]], *, column_titles: Sequence[str], row_titles: Sequence[str] = ()
) -> np.ndarray:
    """Arrange images in a titled grid on a white background.

    Args:
        rows: uint8 cells [H,W,C] with C = 1 or 3, of any sizes. Each cell is enlarged by nearest neighbor, with its
            aspect ratio preserved, to the largest height or width in its row: a 16x16 low-res image next to its 64x64
            ground truth shows its pixels. Short rows end in white.
        column_titles: wrapped to the width of the column, which grows for longer words.
        row_titles: shown on the left.

    Returns:
        uint8 [H,W,3].

    Raises:
        ValueError: a cell has another dtype or shape.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    line = FONT_SIZE + 3
    fitted = [_fit_row(row) for row in rows]
    columns = max([len(column_titles), *(len(row) for row in fitted)])
    widths = [max((row[c].width for row in fitted if c < len(row)), default=1) for c in range(columns)]
    titles = [_wrap(title, width, font) for title, width in zip(column_titles, widths, strict=False)]
    for c, lines in enumerate(titles):
        widths[c] = max([widths[c], *(_text_width(text, font) for text in lines)])
    sides = [_wrap(title, 8 * FONT_SIZE, font) for title in row_titles][: len(fitted)]
    left = max([0, *(_text_width(text, font) + 2 * GUTTER for lines in sides for text in lines)])
    top = max([0, *(len(lines) * line + GUTTER for lines in titles)])
    heights = [max((cell.height for cell in row), default=1) for row in fitted]
    for r, lines in enumerate(sides):
        heights[r] = max(heights[r], len(lines) * line)

    lefts = left + np.cumsum([GUTTER, *(width + GUTTER for width in widths)])
    tops = top + np.cumsum([GUTTER, *(height + GUTTER for height in heights)])
    canvas = PillowImage.new("RGB", (int(lefts[-1]), int(tops[-1])), "white")
    draw = ImageDraw.Draw(canvas)
    for c, lines in enumerate(titles):
        for i, text in enumerate(lines):
            start = int(lefts[c]) + (widths[c] - _text_width(text, font)) // 2
            draw.text((start, GUTTER + i * line), text, fill="black", font=font)
    for r, row in enumerate(fitted):
        for i, text in enumerate(sides[r] if r < len(sides) else ()):
            start_y = int(tops[r]) + (heights[r] - len(sides[r]) * line) // 2 + i * line
            draw.text((GUTTER, start_y), text, fill="black", font=font)
        for c, cell in enumerate(row):
            x, y = (widths[c] - cell.width) // 2, (heights[r] - cell.height) // 2
            canvas.paste(cell, (int(lefts[c]) + x, int(tops[r]) + y))
    return np.array(canvas)


def grid_row(
    ground_truth: np.ndarray,
    low_res: Mapping[int, np.ndarray],
    bicubic: Mapping[int, np.ndarray],
    outputs: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The cells of one image, all showing the same window.

    They are the low-res image and bicubic interpolation at each scale, the outputs and the ground truth. All images
    are uint8 [H,W,3]; their sizes may differ but share the top left corner. `low_res` and `bicubic` are by scale.
    """
    multiple = math.lcm(*low_res)
    images = [ground_truth, *bicubic.values(), *outputs]
    height, width = (min(image.shape[axis] for image in images) for axis in (0, 1))
    height, width = height // multiple * multiple, width // multiple * multiple
    first = next(iter(bicubic.values()))
    rows, columns = detail_window(ground_truth[:height, :width], first[:height, :width], multiple=multiple)
    cells = []
    for scale, small in low_res.items():
        window = [slice(side.start // scale, side.stop // scale) for side in (rows, columns)]
        cells += [small[window[0], window[1]], bicubic[scale][rows, columns]]
    return [*cells, *(output[rows, columns] for output in outputs), ground_truth[rows, columns]]


def detail_window(ground_truth: np.ndarray, bicubic: np.ndarray, *, multiple: int) -> tuple[slice, slice]:
    """The rows and columns to show of an image uint8 [H,W,3]: all of a small one, else WINDOW x WINDOW.

    The window is where the squared error of bicubic interpolation is largest, i.e. where methods can differ: the
    finest structure of the image rather than its strongest edge. It starts and ends at multiples of `multiple`, so
    that it corresponds to a window of the low-res image.
    """
    height, width = ground_truth.shape[:2]
    if max(height, width) <= MAX_WHOLE:
        return slice(0, height), slice(0, width)
    rows, columns = (min(WINDOW, side) // multiple for side in (height, width))  # of the window, in blocks
    rows, columns = max(1, rows), max(1, columns)
    difference = ground_truth.astype(np.int16) - bicubic
    error = sum(
        np.square(difference[:, :, c], dtype=np.int32) for c in range(3)
    )  # one channel at a time, for memory
    error = error[: height // multiple * multiple, : width // multiple * multiple]
    blocks = error.reshape(height // multiple, multiple, width // multiple, multiple)
    blocks = blocks.sum(axis=(1, 3), dtype=np.int64)
    sums = sliding_window_view(blocks, rows, axis=0).sum(axis=-1)
    sums = sliding_window_view(sums, columns, axis=1).sum(axis=-1)
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return (
        slice(int(top) * multiple, int(top + rows) * multiple),
        slice(int(left) * multiple, int(left + columns) * multiple),
    )


def _fit_row(row: Sequence[np.ndarray]) -> list[PillowImage.Image]:
    """The cells of one row as RGB images, each enlarged to the largest height or width among them."""
    cells = [np.asarray(cell) for cell in row]
    for cell in cells:
        if cell.ndim != 3 or cell.shape[2] not in (1, 3) or cell.dtype != np.uint8 or cell.size == 0:
            raise ValueError(f"a grid cell must be uint8 [H,W,1 or 3], got {cell.dtype} {cell.shape}")
    height = max((cell.shape[0] for cell in cells), default=1)
    width = max((cell.shape[1] for cell in cells), default=1)
    fitted = []
    for cell in cells:
        factor = min(height / cell.shape[0], width / cell.shape[1])
        size = max(1, round(cell.shape[1] * factor)), max(1, round(cell.shape[0] * factor))
        rgb = PillowImage.fromarray(np.ascontiguousarray(np.broadcast_to(cell, (*cell.shape[:2], 3))))
        fitted.append(rgb if rgb.size == size else rgb.resize(size, PillowImage.Resampling.NEAREST))
    return fitted


def _wrap(title: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Split a title at spaces and line breaks into lines of at most `width` pixels, or of one longer word."""
    lines: list[str] = []
    for paragraph in title.splitlines():
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and _text_width(longer, font) > width:
                lines.append(current)
                longer = word
            current = longer
        lines.append(current)
    return lines


def _text_width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(np.ceil(font.getlength(text)))
