"""Evaluations and schedule searches as text: Markdown and CSV tables, and the protocol of every column.

Pure: a report is a mapping of plain values, as evaluation.json and search.json hold it. Headings, number formats and
protocols of metrics come from `sr3_jax.metrics.METRICS`. Shape legend: P images.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sr3_jax.diffusion.solvers import solver_options
from sr3_jax.metrics import METRICS, Metric, search_metric
from sr3_jax.sampling import Sampling

RESAMPLES = 1000
LEVEL = 0.95
ROW_KEYS = ("method", "scale", "solver", "steps", "nfe")  # identify a row
ROW_HEADINGS = ("method", "scale", "solver", "steps", "NFE")
_SEARCH_COLUMNS = (
    "psnr",
    "ssim",
    "consistency",
    "lpips",
    "frechet_alexnet",
)  # in the table of a schedule search
_TEXT_HEADINGS = {"method", "solver"}  # left-aligned; the others are right-aligned


def bootstrap(values: np.ndarray) -> dict[str, float]:
    """{'mean', 'low', 'high'} of values [P]: the mean and the percentile interval of the means of resamples.

    The resamples depend on P only, so that rows over the same images share them. An infinite value (the PSNR of an
    exact output) gives an infinite mean, never NaN.
    """
    values = np.asarray(values, np.float64)
    generator = np.random.default_rng(0)
    count = len(values)
    means = [values[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    ends = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return {"mean": float(values.mean()), "low": float(ends[0]), "high": float(ends[1])}


def markdown(report: Mapping[str, Any]) -> str:
    """evaluation.md: means, intervals, protocol and models."""
    parts = [
        means_table(report["rows"]),
        f"{LEVEL:.0%} intervals:",
        intervals_table(report["rows"]),
        "\n".join(f"- {line}" for line in [*protocol(report), *_models(report)]),
    ]
    return "\n\n".join(parts) + "\n"


def means_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the mean of each metric, one line per row; readable in a terminal too."""
    columns = reported_metrics(rows)
    body = [[*_row_cells(row), *(_cell(row, metric) for metric in columns)] for row in rows]
    return table([*ROW_HEADINGS, *(metric.heading for metric in columns)], body)


def intervals_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the intervals of every metric but the time."""
    columns = [metric for metric in reported_metrics(rows) if metric.group != "time"]
    body = [
        [*_row_cells(row)[:4], *(_cell(row, metric, interval=True) for metric in columns)] for row in rows
    ]
    return table([*ROW_HEADINGS[:4], *(metric.heading for metric in columns)], body)


def comma_separated(report: Mapping[str, Any]) -> str:
    """CSV: one line per row with mean, low and high of every metric at full precision."""
    ends = ("mean", "low", "high")
    columns = reported_metrics(report["rows"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ROW_KEYS, *(f"{metric.key}_{end}" for metric in columns for end in ends)])
    for row in report["rows"]:
        values = [row["summary"].get(metric.key, {}).get(end, "") for metric in columns for end in ends]
        cells = ["inf" if value is None else value if value == "" else repr(value) for value in values]
        writer.writerow([*(_text(row[key]) for key in ROW_KEYS), *cells])
    return text.getvalue()


def reported_metrics(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics that at least one row has, in the order of the registry."""
    return [metric for key, metric in METRICS.items() if any(key in row["summary"] for row in rows)]


def _models(report: Mapping[str, Any]) -> list[str]:
    """One line per model, with the hash of its weights."""
    return [
        f"{model['label']}: {model['name']}, {model['scale']}x, {model['parameters'] / 1e6:.2f} M parameters, "
        f"sha256 {model['sha256'][:16]}{', conditioned on the label of each image' * model.get('labeled', False)}."
        for model in report["models"]
    ]


def protocol(report: Mapping[str, Any]) -> list[str]:
    """How the metrics were computed, one sentence per line."""
    settings = report["protocol"]
    count, samples = settings["images"], settings["samples"]
    crop = f", the center {settings['crop']}x{settings['crop']} of each" if settings["crop"] else ""
    per_image = f"{samples} outputs each" if samples > 1 else "one output each"
    lines = [
        f"{count} image{'s' * (count != 1)} of {settings['source']}{crop}, {per_image}, seed "
        f"{settings['seed']}.",
        "low-res: ground truth cropped at the bottom and right to a multiple of the scale, downsampled by "
        "anti-aliased bicubic, rounded to 8 bits.",
    ]
    columns = reported_metrics(report["rows"])
    for metric in columns:
        detail = _protocol_detail(metric, settings)
        if metric.group == "time":
            detail += f"; {_timing(report)}"
        lines.append(f"{metric.heading}: {metric.protocol}{detail}.")
    lines += _set_protocol(report, columns)
    lines += settings.get("omitted", [])
    return [
        *lines,
        "NFE: network function evaluations per image.",
        f"Means over images; {LEVEL:.0%} intervals from {RESAMPLES} bootstrap resamples of the images.",
    ]


def _protocol_detail(metric: Metric, settings: Mapping[str, Any]) -> str:
    """The network behind a metric, if there is one."""
    if metric.key == "lpips" and "lpips" in settings:
        return f"; {_network(settings['lpips'])}"
    if metric.key == "top1" and "classifier" in settings:
        classifier = settings["classifier"]
        kind = f" ({classifier['kind']})" if classifier.get("kind") else ""
        return f"; {_network(classifier)}{kind}, {classifier['classes']} classes"
    features = settings.get("features")
    if metric.group == "set" and features and metric.key == features["distance"]:
        patches = f", in patches of {features['patch']}x{features['patch']}" if features.get("patch") else ""
        return (
            f", {features['reference'] or 'which is their own ground truth'}{patches}; N = {features['count']} in "
            f"every row; {_network(features)}, {features['preprocessing']}; it depends on N, so compare rows of one "
            "table only"
        )
    if metric.group == "set" and features and metric.key.startswith("kid"):
        return f"; the mean over subsets of {features['subset']} if there are more"
    if metric.group == "set" and features:
        return f", {features['splits']} splits in random order"
    return ""


def _set_protocol(report: Mapping[str, Any], columns: Sequence[Metric]) -> list[str]:
    """The intervals of the metrics of the set, and the row of the ground truth."""
    features = report["protocol"].get("features")
    if not features or not any(metric.group == "set" for metric in columns):
        return []
    lines = [
        f"Intervals of metrics of the set: 1.96 standard deviations of {features['resamples']} resamples of the "
        "images, of KID's subsets and of the splits of IS; none if there are too many features to resample."
    ]
    if any(row["method"] == "ground truth" for row in report["rows"]):
        halves = (
            "one random half of the images against the other, i.e. how far apart half as many real images are; a "
            "perfect method would have 0 against its own ground truth"
        )
        against = f"the ground truth against {features['reference']}" if features["reference"] else halves
        lines.append(f"Metrics of the set in row 'ground truth': {against}.")
    return lines


def _timing(report: Mapping[str, Any]) -> str:
    batch, processes = report["protocol"].get("batch", 1), report["protocol"].get("processes", 1)
    at_once = (
        "one image at a time" if batch == 1 else f"batches of {batch}, the batch's time divided by {batch}"
    )
    return f"{report['hardware']}{f', {processes} processes' * (processes > 1)}, {at_once}"


def _network(description: Mapping[str, Any]) -> str:
    return f"{description['network']}, weights sha256 {description['sha256'][:16]}"


# ---- A schedule search


def search_markdown(report: Mapping[str, Any]) -> str:
    """search.md: the protocol of the search, its table, and the choice."""
    metric = search_metric(report["metric"])
    shown = reported_metrics([{"summary": row["check"]} for row in report["rows"]])
    shown = [other for other in shown if other.key in {*_SEARCH_COLUMNS, metric.key}]
    headings = ["solver", "NFE", "steps", "which", "spacing", "log-SNR", "noise", "other"]
    headings += [f"{metric.heading}, searched", *(other.heading for other in shown), "gain"]
    body = [_search_cells(row, metric, shown) for row in report["rows"]]
    where = report["eval_data"] or "the other images of the same data"
    lines = [
        f"# Schedule search: {report['model']}",
        "",
        f"By {metric.heading} on {report['search_crops']} crops of {report['crop']} pixels of {report['data']}, "
        f"{report['tried']} candidates, seed {report['seed']}. The columns after the searched one are computed on "
        f"{report['check_crops']} crops of {where}, which the search did not use. Gain: how much better than the "
        f"solver's default there, with a {LEVEL:.0%} interval over the crops.",
        "",
        table(headings, body),
        "",
        report["choice"],
        "",
    ]
    return "\n".join(lines)


def _search_cells(row: Mapping[str, Any], metric: Metric, shown: Sequence[Metric]) -> list[str]:
    sampling = Sampling(**row["sampling"])
    ends = ["-" if end is None else f"{end:.1f}" for end in (sampling.log_snr_min, sampling.log_snr_max)]
    noise = [f"{name}={getattr(sampling, name):g}" for name in solver_options(sampling.solver)]
    default = Sampling()
    other = [
        f"{name}={getattr(sampling, name):g}"
        for name in ("guidance", "augment", "back_projection")
        if getattr(sampling, name) != getattr(default, name)
    ]
    gain = row["gain"]
    return [
        sampling.solver,
        str(row["nfe"]),
        str(sampling.steps),
        row["which"],
        sampling.spacing or "default",
        "-" if ends == ["-", "-"] else f"{ends[0]} to {ends[1]}",
        ", ".join(noise) or "-",
        ", ".join(other) or "-",
        _value(row["search"], metric),
        *(_value(row["check"], one) for one in shown),
        f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f})"
        if gain and row["which"] == "best"
        else "-",
    ]


def _value(values: Mapping[str, float | None], metric: Metric) -> str:
    return metric.format(values[metric.key]) if metric.key in values else "-"


# ---- Markdown


def table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded with spaces so that the columns also line up as plain text."""
    # Markdown needs at least three dashes.
    widths = [max(3, *(len(line[i]) for line in [headings, *body])) for i in range(len(headings))]
    left = [heading in _TEXT_HEADINGS for heading in headings]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(cells, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if to_left else "-" * (width - 1) + ":"
        for width, to_left in zip(widths, left, strict=True)
    ]
    return "\n".join(line(cells) for cells in [headings, rule, *body])


def _row_cells(row: Mapping[str, Any]) -> list[str]:
    """The cells that identify a row; the solver's cell names settings that are not its defaults."""
    solver = _text(row["solver"]) + (f" ({row['detail']})" if row.get("detail") else "")
    return [row["method"], f"{row['scale']}x", solver, *(_text(row[key]) for key in ("steps", "nfe"))]


def _cell(row: Mapping[str, Any], metric: Metric, *, interval: bool = False) -> str:
    """The mean, or 'LOW..HIGH' where there is an interval; empty for a metric that the row lacks."""
    ends = row["summary"].get(metric.key)
    if ends is None:
        return ""
    if interval and "low" in ends:
        return f"{metric.format(ends['low'])}..{metric.format(ends['high'])}"
    return metric.format(ends["mean"])


def _text(value: Any) -> str:
    return "" if value is None else str(value)
