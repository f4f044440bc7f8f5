"""Curves of quality against the number of network evaluations, generate_jit with Pillow alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDE, HIGH = 460, 340  # of one panel
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 44
FINE = 3  # generate_jit so much larger and shrunk, which smooths the lines
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
INK, FAINT = "#333333", "#e4e4e4"

Curves = Mapping[str, Sequence[tuple[float, float]]]


def image(panels: Mapping[str, tuple[Curves, Mapping[str, float]]], *, axis: str) -> np.ndarray:
    """Panels side by side as uint8 [H,W,3], a legend below.

    Args:
        panels: {title: (curves {name: [(x, y), ...]}, level lines {name: y})}; x on a logarithmic axis.
        axis: what x is.
    """
    names = list(dict.fromkeys(name for curves, _ in panels.values() for name in curves))
    levels = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    canvas = Image.new("RGB", (FINE * WIDE * len(panels), FINE * (HIGH + 30)), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (title, (curves, lines)) in enumerate(panels.items()):
        _panel(draw, place * WIDE, title, curves, lines, names=names, levels=levels, axis=axis)
    across = LEFT
    for number, name in enumerate([*names, *levels]):
        at, dashed = HIGH + 12, number >= len(names)
        _line(draw, (across, at), (across + 26, at), _colour(number, len(names)), dashed=dashed)
        _text(draw, (across + 32, at), name, anchor="lm")
        across += 32 + _length(draw, name) + 22
    small = canvas.resize((canvas.width // FINE, canvas.height // FINE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(
    draw: ImageDraw.ImageDraw,
    left: int,
    title: str,
    curves: Curves,
    lines: Mapping[str, float],
    *,
    names: Sequence[str],
    levels: Sequence[str],
    axis: str,
) -> None:
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points] + list(lines.values())
    margin = 0.06 * ((max(ys) - min(ys)) or 1.0)
    low, high = min(ys) - margin, max(ys) + margin
    ends = math.log(xs[0]) - 0.1, math.log(xs[-1]) + 0.1
    box = (left + LEFT, TOP, left + WIDE - RIGHT, HIGH - BOTTOM)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - ends[0]) / (ends[1] - ends[0])
        return box[0] + across * (box[2] - box[0]), box[3] - (y - low) / (high - low) * (box[3] - box[1])

    for y in ticks(low, high):
        _line(draw, (box[0], at(xs[0], y)[1]), (box[2], at(xs[0], y)[1]), FAINT, width=1)
        _text(draw, (box[0] - 6, at(xs[0], y)[1]), f"{y:g}", anchor="rm")
    last = -math.inf
    for x in xs:
        across = at(x, low)[0]
        if across - last > 16:
            _line(draw, (across, box[3]), (across, box[3] + 4), INK, width=1)
            _text(draw, (across, box[3] + 13), f"{x:g}", anchor="mm")
            last = across
    draw.rectangle([FINE * side for side in box], outline=INK, width=FINE)
    _text(draw, ((box[0] + box[2]) / 2, TOP - 14), title, anchor="mm", size=14)
    _text(draw, ((box[0] + box[2]) / 2, box[3] + 30), axis, anchor="mm")
    for name, y in lines.items():
        colour = _colour(len(names) + levels.index(name), len(names))
        _line(draw, (box[0], at(xs[0], y)[1]), (box[2], at(xs[0], y)[1]), colour, dashed=True)
    for name, points in curves.items():
        colour = _colour(names.index(name), len(names))
        places = [at(x, y) for x, y in sorted(points)]
        for start, end in itertools.pairwise(places):
            _line(draw, start, end, colour)
        for across, down in places:
            draw.ellipse([FINE * (v + d) for d in (-3, 3) for v in (across, down)], fill=colour)


def _colour(number: int, curves: int) -> str:
    return (
        COLOURS[number % len(COLOURS)] if number < curves else ("#555555", "#999999")[(number - curves) % 2]
    )


def _line(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    width: int = 2,
    dashed: bool = False,
) -> None:
    """From left to right; dashed ones are level."""
    pieces = [(start, end)]
    if dashed:
        starts = np.arange(start[0], end[0], 8)
        pieces = [((x, start[1]), (min(x + 5, end[0]), end[1])) for x in starts]
    for one, other in pieces:
        draw.line([FINE * v for v in (*one, *other)], fill=colour, width=FINE * width)


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, *, anchor: str, size: int = 12
) -> None:
    font = ImageFont.load_default(FINE * size)
    draw.text((FINE * at[0], FINE * at[1]), text, fill=INK, font=font, anchor=anchor)


def _length(draw: ImageDraw.ImageDraw, text: str) -> float:
    return draw.textlength(text, font=ImageFont.load_default(FINE * 12)) / FINE
