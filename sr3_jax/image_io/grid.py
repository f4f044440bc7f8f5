"""Titled grids of images, to look at. Runs on the host, with NumPy and Pillow only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

GUTTER = 2  # pixels between cells
FONT_SIZE = 12  # pixels


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
