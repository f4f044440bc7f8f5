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
    Column("lpips", "LPIPS", 4),
    Column("top1", "top-1 %", 1),
    Column("top5", "top-5 %", 1),
    Column("fid", "FID", 2),
    Column("kid", "KID", 2),
    Column("inception_score", "IS", 2),
    Column("frechet_alexnet", "Frechet (AlexNet)", 3),
    Column("kid_alexnet", "KID (AlexNet)", None),
    Column("frechet_classifier", "Frechet (classifier)", 3),
    Column("kid_classifier", "KID (classifier)", None),
    Column("frechet_inception_unknown", "Frechet (unknown Inception)", 2),
    Column("kid_inception_unknown", "KID (unknown Inception)", None),
    Column("inception_score_inception_unknown", "IS (unknown Inception)", 2),
    Column("diversity", "diversity", 2),
    Column("diversity_lpips", "LPIPS of pairs", 4),
    Column("seconds", "s/image", None),
)  # in the order of a table; a column that no row has is left out
ROW = ("method", "scale", "solver", "steps", "evaluations")  # what tells one row of a table from another
ROW_HEADINGS = ("method", "scale", "solver", "steps", "evals")
_NAMES = {"fid": "FID", "frechet_alexnet": "Frechet (AlexNet)", "frechet_classifier": "Frechet (classifier)"}
_LEFT = {"method", "solver"}  # columns of words; the others are set to the right


def bootstrap(values: np.ndarray) -> dict[str, float]:
    """{'mean', 'low', 'high'} of values [n]: the mean and the percentile interval of means of resamples.

    The resamples depend on n alone, so that rows over the same images see the same ones. An infinite value
    (the PSNR of an exact output) makes the mean infinite, and never a NaN.
    """
    values = np.asarray(values, np.float64)
    draw = np.random.default_rng(0)
    count = len(values)
    means = [values[draw.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return {"mean": float(values.mean()), "low": float(ends[0]), "high": float(ends[1])}


def summary(values: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """From {column key: [images, samples]} the mean over both, with an interval over the images."""
    return {key: bootstrap(np.asarray(of).mean(axis=1)) for key, of in values.items()}


def protocol(evaluation: Mapping[str, Any], *, source: str | None = None) -> list[str]:
    """One sentence a line. `source` is another name for the images."""
    how = evaluation["protocol"]
    columns = {column.key for column in measured(evaluation["rows"])}
    count, samples = how["images"], how["samples"]
    crop = f", the centre {how['crop']}x{how['crop']} of each" if how["crop"] else ""
    draws = f"{samples} outputs each" if samples > 1 else "one output each"
    lines = [
        f"{count} image{'s' * (count != 1)} of {source or how['source']}{crop}, {draws}, seed {how['seed']}.",
        "low-res: cut at the bottom and right to a multiple of the scale, anti-aliased bicubic, rounded to 8 bits.",
        "PSNR (dB), SSIM: RGB, 0-255, no border crop, 11x11 Gaussian window of sigma 1.5.",
        "PSNR-Y (dB), SSIM-Y: luma of BT.601 (16-235), a border as wide as the scale cropped.",
        "consist.: squared error of the output, shrunk by the same bicubic, to the low-res; 1e-5, range 0-1.",
        "colour: largest difference between a channel's mean and the low-res image's, of 255 levels.",
    ]
    if "lpips" in columns and "lpips" in how:
        lines.append(
            f"LPIPS to the original: {_network(how['lpips'])}, RGB, uncropped, at the image's own size."
        )
    if "top1" in columns and "classifier" in how:
        known, five = how["classifier"], "top5" in columns
        kind = f" ({known['kind']})" if known.get("kind") else ""
        lines.append(
            f"top-1 %{', top-5 %' * five}: outputs whose label is the classifier's best guess"
            f"{', or among its best five' * five}; {_network(known)}{kind}, {known['classes']} classes."
        )
    lines += _of_sets(evaluation, columns)
    if "diversity" in columns:
        lines.append(
            "diversity: standard deviation (n - 1) over the outputs of one input, of 255 levels, mean over pixels and "
            f"channels{'; LPIPS of pairs: mean over all pairs of them' * ('diversity_lpips' in columns)}."
        )
    lines += how.get("absent", [])
    batch = how.get("batch", 1)
    at_once = (
        "one image at a time" if batch == 1 else f"{batch} at a time, the batch's time divided by {batch}"
    )
    processes = f", {how['processes']} processes" if how.get("processes", 1) > 1 else ""
    seconds = f"wall time on {evaluation['hardware']}{processes}, {at_once}, without compilation"
    return [
        *lines,
        f"evals, s/image: network evaluations and seconds an image; {seconds}.",
        f"Means over images; {LEVEL:.0%} intervals from {RESAMPLES} bootstrap resamples of the images.",
    ]


def models(evaluation: Mapping[str, Any]) -> list[str]:
    """One line a model: what it is and the digest that proves it."""
    return [
        f"{model['label']}: {model['name']}, {model['scale']}x, {model['parameters']:,} weights, "
        f"sha256 {model['sha256'][:16]}{', told the label of each image' * model.get('labelled', False)}."
        for model in evaluation["models"]
    ]


def measured(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that at least one row has."""
    return [column for column in COLUMNS if any(column.key in row["summary"] for row in rows)]


def means_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one line a row, the mean of each column; it reads as a table in a terminal too."""
    columns = measured(rows)
    body = [[*_row_cells(row), *(_mean(row, column) for column in columns)] for row in rows]
    return table([*ROW_HEADINGS, *(column.heading for column in columns)], body)


def intervals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the intervals of every column but the time."""
    columns = [column for column in measured(rows) if column.key != "seconds"]
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
    columns = measured(evaluation["rows"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ROW, *(f"{column.key}_{end}" for column in columns for end in ends)])
    for row in evaluation["rows"]:
        figures = [row["summary"].get(column.key, {}).get(end, "") for column in columns for end in ends]
        cells = ["inf" if x is None else x if x == "" else repr(x) for x in figures]
        writer.writerow([*(_blank(row[key]) for key in ROW), *cells])
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


def _of_sets(evaluation: Mapping[str, Any], columns: set[str]) -> list[str]:
    """How the figures of the set as a whole were made, if it has any."""
    features = evaluation["protocol"].get("features")
    if not features or features["distance"] not in columns:
        return []
    name = _NAMES.get(features["distance"], "Frechet (unknown Inception)")
    kid = name.replace("Frechet", "KID") if name != "FID" else "KID"
    against = features["reference"]
    patches = f" in patches of {features['patch']}x{features['patch']}" if features.get("patch") else ""
    lines = [
        f"{name}: Frechet distance of the first output of each image{patches}, N = {features['count']} in every row, "
        f"to {against}; {_network(features)}, {features['preprocessing']}. It depends on N: compare rows of one table."
    ]
    if f"kid{features['distance'].removeprefix('frechet').removeprefix('fid')}" in columns:
        lines.append(
            f"{kid}: kernel distance of the same features (1e-3), the mean over subsets of {features['subset']} where "
            "there are more, and below 0 by chance or where outputs are close to their own originals."
        )
    if any(key.startswith("inception_score") for key in columns):
        lines.append(f"IS: Inception score of the same network, {features['splits']} splits in random order.")
    lines.append(
        f"Intervals of these: 1.96 standard deviations of {features['resamples']} resamples of the images"
        ", of KID's subsets and of IS's splits; none where there are too many features to resample."
    )
    if any(row["method"] == "original" for row in evaluation["rows"]):
        halves = (
            "one random half of the original images beside the other: how far apart half as many real "
            "images are; a perfect method, beside its own originals, would have 0"
        )
        lines.append(f"Row 'original' of these: {features['original'] or halves}.")
    return lines


def _network(about: Mapping[str, Any]) -> str:
    return f"{about['network']}, weights sha256 {about['sha256'][:16]}"


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    """A sampler that is not its solver's usual says so: only then are its steps not all there is to it."""
    solver = _blank(row["solver"]) + (f" ({row['detail']})" if row.get("detail") else "")
    return [
        row["method"],
        f"{row['scale']}x",
        solver,
        *(_blank(row[key]) for key in ("steps", "evaluations")),
    ]


def _mean(row: Mapping[str, Any], column: Column) -> str:
    ends = row["summary"].get(column.key)
    return "" if ends is None else figure(ends["mean"], column.digits)


def _interval(row: Mapping[str, Any], column: Column) -> str:
    """A figure without an interval stands alone."""
    ends = row["summary"].get(column.key)
    if ends is None:
        return ""
    if "low" not in ends:
        return figure(ends["mean"], column.digits)
    return f"{figure(ends['low'], column.digits)}..{figure(ends['high'], column.digits)}"


def _blank(value: Any) -> str:
    return "" if value is None else str(value)
