"""An evaluation as tables: means with bootstrap intervals, Markdown, CSV, and the protocol of every column.

Pure: an evaluation is a mapping of plain values, as `evaluation.json` holds it, and becomes text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Column(NamedTuple):
    """A measured column: its key in the JSON, its heading, its digits after the point (None: 3 in all)."""

    key: str
    heading: str
    digits: int | None


COLUMNS = (
    Column("psnr", "PSNR", 2),
    Column("ssim", "SSIM", 4),
    Column("psnr_luma", "PSNR-Y", 2),
    Column("ssim_luma", "SSIM-Y", 4),
    Column("consistency", "consist.", 2),
    Column("mean_colour_error", "colour", 2),
    Column("seconds", "s/picture", None),
)
ROW = ("method", "scale", "solver", "steps", "evaluations")  # what tells one row of a table from another
ROW_HEADINGS = ("method", "scale", "solver", "steps", "evals")
_LEFT = {"method", "solver"}  # columns of words; the others are set to the right


def bootstrap(values: np.ndarray) -> dict[str, float]:
    """{'mean', 'low', 'high'} of values [n]: the mean and the percentile interval of means of resamples.

    The resamples depend on n alone, so that rows over the same pictures see the same ones. An infinite value
    (the PSNR of an exact output) makes the mean infinite, and never a NaN.
    """
    values = np.asarray(values, np.float64)
    draw = np.random.default_rng(0)
    count = len(values)
    means = [values[draw.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return {"mean": float(values.mean()), "low": float(ends[0]), "high": float(ends[1])}


def summary(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """From {column key: [pictures, samples]} the mean over both, with an interval over the pictures."""
    return {key: bootstrap(np.asarray(of).mean(axis=1)) for key, of in values.items()}


def protocol(evaluation: Mapping[str, Any], *, source: str | None = None) -> list[str]:
    """One sentence a line: how each figure was made. `source` is another name for the pictures."""
    how = evaluation["protocol"]
    count, samples = how["pictures"], how["samples"]
    crop = f", the centre {how['crop']}x{how['crop']} of each" if how["crop"] else ""
    draws = f"{samples} outputs each" if samples > 1 else "one output each"
    seconds = f"wall time on {evaluation['hardware']}, one picture at a time, without compilation"
    return [
        f"{count} picture{'s' * (count != 1)} of {source or how['source']}{crop}, {draws}, seed {how['seed']}.",
        "low-res: cut at the bottom and right to a multiple of the scale, anti-aliased bicubic, rounded to 8 bits.",
        "PSNR (dB), SSIM: RGB, 0-255, no border crop, 11x11 Gaussian window of sigma 1.5.",
        "PSNR-Y (dB), SSIM-Y: luma of BT.601 (16-235), a border as wide as the scale cropped.",
        "consist.: squared error of the output, shrunk by the same bicubic, to the low-res; 1e-5, range 0-1.",
        "colour: largest difference between a channel's mean and the low-res picture's, of 255 levels.",
        f"evals, s/picture: network evaluations and seconds a picture; {seconds}.",
        f"Means over pictures; {LEVEL:.0%} intervals from {RESAMPLES} bootstrap resamples of the pictures.",
    ]


def models(evaluation: Mapping[str, Any]) -> list[str]:
    """One line a model: what it is and the digest that proves it."""
    return [
        f"{model['label']}: {model['name']}, {model['scale']}x, {model['parameters']:,} weights, "
        f"sha256 {model['sha256'][:16]}."
        for model in evaluation["models"]
    ]


def means_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line a row, the mean of each column; it reads as a table in a terminal too."""
    body = [
        [*_row_cells(row), *(_mean(row, column) for column in COLUMNS)]
        for row in rows
    ]  # fmt: skip
    return table([*ROW_HEADINGS, *(column.heading for column in COLUMNS)], body)


def intervals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the intervals of every column but the time."""
    columns = COLUMNS[:-1]
    body = [[*_row_cells(row)[:4], *(_interval(row, column) for column in columns)] for row in rows]
    return table([*ROW_HEADINGS[:4], *(column.heading for column in columns)], body)


def markdown(evaluation: Mapping[str, Any], *, source: str | None = None) -> str:
    """The whole page: means, intervals, protocol, models."""
    parts = [
        means_table(evaluation["rows"]),
        f"{LEVEL:.0%} intervals:",
        intervals_table(evaluation["rows"]),
        "\n".join(f"- {line}" for line in [*protocol(evaluation, source=source), *models(evaluation)]),
    ]
    return "\n\n".join(parts) + "\n"


def comma_separated(evaluation: Mapping[str, Any]) -> str:
    """CSV: one line a row; mean, low and high of every column at full precision."""
    ends = ("mean", "low", "high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ROW, *(f"{column.key}_{end}" for column in COLUMNS for end in ends)])
    for row in evaluation["rows"]:
        figures = [row["summary"][column.key][end] for column in COLUMNS for end in ends]
        writer.writerow(
            [*(_blank(row[key]) for key in ROW), *("inf" if x is None else repr(x) for x in figures)]
        )
    return text.getvalue()


def table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its cells filled up by spaces, so that the columns line up as plain text."""
    widths = [
        max(3, *(len(line[column]) for line in [headings, *body])) for column in range(len(headings))
    ]  # Markdown wants three dashes
    lefts = [heading in _LEFT for heading in headings]

    def line(cells: Sequence[str]) -> str:
        filled = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(cells, widths, lefts, strict=True)
        ]
        return f"| {' | '.join(filled)} |"

    rule = [
        "-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, lefts, strict=True)
    ]
    return "\n".join(line(cells) for cells in [headings, rule, *body])


def figure(value: float | None, digits: int | None) -> str:
    """A number of a table; a value of None is how JSON holds an infinite one."""
    if value is None or math.isinf(value):
        return "inf"
    return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    scale = f"{row['scale']}x"
    return [row["method"], scale, *(_blank(row[key]) for key in ("solver", "steps", "evaluations"))]


def _mean(row: Mapping[str, Any], column: Column) -> str:
    return figure(row["summary"][column.key]["mean"], column.digits)


def _interval(row: Mapping[str, Any], column: Column) -> str:
    ends = row["summary"][column.key]
    return f"{figure(ends['low'], column.digits)}..{figure(ends['high'], column.digits)}"


def _blank(value: Any) -> str:
    return "" if value is None else str(value)
