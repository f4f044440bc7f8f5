"""Pure image maths: uint8 <-> [-1,1], the one bicubic of this package, padding, image grids.

Shape legend: B batch, H height, W width, C channels. Everything but `image_grid` is jax, pure, and may be
called inside `jit`; sizes and scales are static.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from sr3_jax.types import Image

GUTTER = 2  # pixels between the cells of a grid
FONT_SIZE = 12


def to_unit(image: jax.Array | np.ndarray) -> Image:
    """Levels 0..255 of any dtype -> float32 in [-1,1]. `to_uint8` is its exact inverse on the 256 levels."""
    # An exact difference and one product: the same bits inside and outside jit, where x / 127.5 - 1 has two.
    return (jnp.asarray(image).astype(jnp.float32) - 127.5) * (1 / 127.5)


def to_uint8(image: jax.Array | np.ndarray) -> jax.Array:
    """[-1,1] -> uint8: clipped, rounded to the nearest level (for a NaN the result is undefined)."""
    levels = (jnp.asarray(image).astype(jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(levels), 0.0, 255.0).astype(jnp.uint8)


def resize_bicubic(x: jax.Array | np.ndarray, height: int, width: int) -> Image:
    """Resize floats [B,H,W,C] to float32 [B,height,width,C] as Pillow's BICUBIC does, up or down.

    Keys' cubic with a = -0.5, widened by the ratio when shrinking (anti-aliased). Pixel centres lie at
    half-integers, so the outer edges of both images coincide; taps outside the image are dropped and the rest
    sum to one again, so a flat image stays flat. Overshoot is not clipped. Within 0.01/255 of Pillow's float
    mode at whole ratios of any size; at odd ratios of sides above 1000, float32 positions cost up to 0.1/255.
    Raises ValueError for integer pixels (take `to_unit` first), for another rank, and for a size below 1.
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"resize_bicubic takes [B,H,W,C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"resize_bicubic takes floats, got {x.dtype}: take to_unit of uint8 pixels")
    if height < 1 or width < 1:
        raise ValueError(f"resize_bicubic cannot resize to {height}x{width}: both sides must be at least 1")
    shape = (x.shape[0], height, width, x.shape[3])
    # Two matrix products. HIGHEST, or TPU's bfloat16 and NVIDIA's TF32 passes would cost up to a grey level.
    precision = jax.lax.Precision.HIGHEST
    return jax.image.resize(x.astype(jnp.float32), shape, "cubic", antialias=True, precision=precision)


def degrade(image: jax.Array | np.ndarray, scale: int) -> Image:
    """High-res [B,H,W,C] in [-1,1] -> low_res [B,H/scale,W/scale,C]: bicubic down, on the 256 uint8 levels.

    The rounding is part of the task: the network then sees in training what a low-res image file can hold.
    Raises ValueError if H or W is not divisible by scale.
    """
    height, width = image.shape[1:3]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"image of {height}x{width} is not divisible by scale {scale}: crop it first")
    return to_unit(to_uint8(resize_bicubic(image, height // scale, width // scale)))


def upsample(low_res: jax.Array | np.ndarray, scale: int) -> Image:
    """Low-res [B,h,w,C] -> [B,h*scale,w*scale,C] float32: the network's condition, not clipped."""
    height, width = low_res.shape[1:3]
    return resize_bicubic(low_res, height * scale, width * scale)


def pad_to_multiple(x: jax.Array | np.ndarray, multiple: int) -> jax.Array:
    """[B,H,W,C] padded at the bottom and right by its edge pixels to multiples of `multiple`; same dtype."""
    x = jnp.asarray(x)
    bottom, right = (-x.shape[1]) % multiple, (-x.shape[2]) % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")


def image_grid(
    rows: Sequence[Sequence[np.ndarray]], *, column_titles: Sequence[str], row_titles: Sequence[str] = ()
) -> np.ndarray:
    """Lay out uint8 cells [H,W,C] (C 1 or 3; sizes may differ) as one titled image uint8 [H,W,3] on white.

    Within a row each cell is enlarged by nearest neighbour, keeping its aspect, until it touches the row's
    largest height or width: a 16x16 low-res beside its 64x64 original shows its pixels. Titles are wrapped to
    the width of their column, which grows where a word is wider; missing titles and short rows leave white.
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
    """The cells of one row as RGB images, each enlarged to touch the largest height or width among them."""
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
    """Break a title at spaces (and its own line breaks) into lines of `width` pixels where words allow."""
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
