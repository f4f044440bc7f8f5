"""The results of an evaluation: summarized as rows, and written as JSON, Markdown and CSV.

A report is a mapping of plain values, as evaluation.json holds it; the text is made of a report only. Headings, number
formats and protocols of metrics come from `sr3_jax.metrics.METRICS`. Shape legend: P images, S samples.
"""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.distributed.processes import hardware
from sr3_jax.evaluation.cache import FeatureCache, Part, Result
from sr3_jax.evaluation.outputs import BICUBIC, GROUND_TRUTH, Method, Settings
from sr3_jax.features import set_metrics
from sr3_jax.features.lpips import LEAST_SIDE
from sr3_jax.features.metric_suite import MetricSuite
from sr3_jax.files import to_json, write_text
from sr3_jax.metrics import METRICS, Metric

FORMAT = "sr3_jax.evaluation.2"
RESAMPLES = 1000
LEVEL = 0.95
ROW_KEYS = ("method", "scale", "solver", "steps", "nfe")  # identify a row
ROW_HEADINGS = ("method", "scale", "solver", "steps", "NFE")
BASELINES = (GROUND_TRUTH, BICUBIC)
_TEXT_HEADINGS = {"method", "solver"}  # left-aligned; the others are right-aligned


def make_report(
    part: Part,
    methods: Sequence[Method],
    outputs: Path,
    suite: MetricSuite,
    settings: Settings,
    *,
    source: str,
    seconds: float,
    pairs: bool = False,
    programs: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        outputs: the folder of the outputs, with the cache of their features.
        source: the name of the data set.
        seconds: wall time of the evaluation.
        pairs: the data set has the low-res images.
        programs: the folders of other programs' outputs, by label.
    """
    rows, networks = summarize(part, methods, outputs, suite)
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seconds": round(seconds, 1),
        "outputs_reused": sum(result.reused for image in part.images for result in image.results),
        "hardware": hardware(),
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "protocol": {
            "source": source,
            "images": len(part.images),
            "samples": settings.samples,
            "seed": settings.seed,
            "crop": settings.crop,
            "degradation": "pairs" if pairs else settings.degradation,
            "programs": dict(programs or {}),
            "batch": settings.batch_size,
            "processes": settings.process[1],
            **networks,
        },
        "models": _models(methods),
        "images": [
            {"name": image.name, "height": image.height, "width": image.width} for image in part.images
        ],
        "failed": [reason for _, reason in part.failed],
        "rows": rows,
    }
    report["protocol"]["sentences"] = protocol(report)
    return report


def summarize(
    part: Part, methods: Sequence[Method], outputs: Path, suite: MetricSuite
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the tables and of evaluation.json, one for each method, and the networks' part of the protocol.

    A row has the method's name, scale, solver, steps, detail, nfe and own; 'summary', {metric: {'mean', 'low',
    'high'}}; and 'images', {image: {metric: one value per sample, or one for all}}. None stands for infinity. Metrics
    that could not be computed for every image are left out, and the protocol says so.
    """
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for number, method in enumerate(methods):
        results = [image.results[number] for image in part.images]
        keys = dict.fromkeys(key for result in results for key in result.metrics)
        missing = {key: sum(key not in result.metrics for result in results) for key in keys}
        left_out |= {key: count for key, count in missing.items() if count}
        complete = [key for key in keys if not missing[key]]
        summary: dict[str, Mapping[str, float]] = {
            key: bootstrap(np.array([result.metrics[key] for result in results]).mean(axis=1))
            for key in complete
        }
        summary |= _set_metrics(results, method, outputs, suite)
        row: dict[str, Any] = {"method": method.name}
        row |= {name: getattr(method, name) for name in ("scale", "solver", "steps", "detail", "nfe", "own")}
        row["summary"] = {key: to_json(interval) for key, interval in summary.items()}
        row["images"] = {
            image.name: {key: _finite_or_none(result.metrics[key]) for key in complete}
            for image, result in zip(part.images, results, strict=True)
        }
        rows.append(row)
    if suite.lpips is not None and not any("lpips" in row["summary"] for row in rows):
        left_out.setdefault("lpips", len(part.images))  # all images are too small
    return rows, _networks(part, rows, suite, left_out)


def _set_metrics(
    results: Sequence[Result], method: Method, outputs: Path, suite: MetricSuite
) -> Mapping[str, Mapping[str, float]]:
    """Metrics of the set by the cached features of a method; empty if some images have none."""
    if suite.network is None:
        return {}
    cache = FeatureCache(outputs, suite.network.protocol)
    generated = [key for result in results for key in result.output_features]
    truth = [key for result in results for key in result.ground_truth_features]
    if cache.missing([*generated, *truth]):
        return {}
    options: dict[str, Any] = {"logits": suite.network.logits, "reference": suite.reference}
    options["reference_features"] = suite.reference_features
    if len(truth) > len(results):
        patches = [len(result.ground_truth_features) for result in results]
        options["images"] = np.repeat(np.arange(len(results)), patches)
    protocol = suite.network.protocol
    if method.is_ground_truth:
        return set_metrics.ground_truth_metrics(cache.get(truth), protocol, **options)
    return set_metrics.output_metrics(cache.get(generated), cache.get(truth), protocol, **options)


def _networks(
    part: Part, rows: Sequence[Mapping[str, Any]], suite: MetricSuite, left_out: Mapping[str, int]
) -> dict[str, Any]:
    """The networks behind the metrics, and sentences about omitted ones, for the protocol.

    Args:
        left_out: {metric: how many images it could not be computed for}.
    """
    images = len(part.images)
    omitted = [*suite.omitted]
    for key, count in left_out.items():
        heading = METRICS[key].heading if key in METRICS else key
        omitted.append(
            f"{heading} is omitted: {count} of {images} images have a side shorter than {LEAST_SIDE} pixels."
        )
    found: dict[str, Any] = {}
    if suite.lpips is not None:
        found["lpips"] = {"network": suite.lpips.name, "sha256": suite.lpips.sha256}
    if suite.classifier is not None:
        found["classifier"] = {
            "network": suite.classifier.name,
            "sha256": suite.classifier.sha256,
            "classes": suite.classifier.num_classes,
            "kind": getattr(suite.classifier, "kind", ""),
        }
    if suite.network is not None:
        protocol = suite.network.protocol
        count = sum(len(image.results[0].ground_truth_features) for image in part.images)
        found["features"] = features_protocol(suite, count=count, images=images)
        keys = set_metrics.metric_keys(protocol)
        if not any(key in row["summary"] for row in rows for key in keys):
            reason = (
                "they need at least 2 images"
                if images < 2
                else f"some images have a side shorter than {LEAST_SIDE} pixels"
            )
            omitted.append(f"Metrics of the set ({protocol.network}) are omitted: {reason}.")
    return found | {"omitted": omitted}


def features_protocol(suite: MetricSuite, *, count: int, images: int) -> dict[str, Any]:
    """The features behind the metrics of sets, for the protocol.

    Args:
        count: of images, or of patches, in every row; 0 if rows differ.
        images: the number of images.
    """
    assert suite.network is not None
    protocol, reference = suite.network.protocol, suite.reference
    unit = "patches" if suite.network.patch else "images"
    return {
        "network": protocol.network,
        "sha256": protocol.weights_sha256,
        "preprocessing": protocol.preprocessing,
        "distance": protocol.distance,
        "count": count,
        "images": images,
        "patch": suite.network.patch,
        "reference": f"{suite.reference_name} ({reference.count} {unit})" if reference else "",
        "subset": set_metrics.SUBSET,
        "splits": set_metrics.SPLITS,
        "resamples": set_metrics.RESAMPLES,
    }


def _models(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The models of evaluation.json."""
    first: dict[str, Method] = {}
    for method in methods:
        first.setdefault(method.name, method)
    return [
        {
            "label": method.name,
            "name": method.model.name,
            "scale": method.scale,
            "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(method.model.params)),
            "sha256": method.settings["weights"],
            "labeled": method.uses_labels,
            "given_label": method.model.label,
            "config": method.model.config,
        }
        for method in first.values()
        if method.model is not None
    ]


def write_tables(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write evaluation.json, evaluation.md and evaluation.csv. UserError if one cannot be written."""
    texts = {
        "evaluation.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "evaluation.md": markdown(report),
        "evaluation.csv": comma_separated(report),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _finite_or_none(values: Sequence[float]) -> list[float | None]:
    """Values for JSON, which has no infinity."""
    return [float(value) if math.isfinite(value) else None for value in values]


# ---- Text


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
        rows_table(report["rows"]),
        f"{LEVEL:.0%} intervals:",
        rows_table(report["rows"], intervals=True),
        *_paired_part(report["rows"]),
        "\n".join(f"- {line}" for line in [*protocol(report), *_model_lines(report)]),
    ]
    return "\n\n".join(parts) + "\n"


def rows_table(rows: Sequence[Mapping[str, Any]], *, intervals: bool = False) -> str:
    """Markdown, one line per row: the mean of each metric, or the interval of each but the time."""
    columns = [metric for metric in reported_metrics(rows) if not (intervals and metric.group == "time")]
    first = ROW_HEADINGS[: 4 if intervals else 5]
    body = [
        [*_row_cells(row)[: len(first)], *(_cell(row, metric, interval=intervals) for metric in columns)]
        for row in rows
    ]
    return table([*first, *(metric.heading for metric in columns)], body)


def _paired_part(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The differences of all rows to the first model or program over the same images; empty if it is the only one."""
    first = next((row for row in rows if row["method"] not in BASELINES), None)
    others = [row for row in rows if row is not first and row["method"] != GROUND_TRUTH]
    if first is None or not any(row["method"] not in BASELINES for row in others):
        return []
    columns = [metric for metric in reported_metrics(rows) if metric.group in ("image", "classifier")]
    if not columns:
        return []  # sets without ground truth
    body = [
        [*_row_cells(row)[:4], *(_difference(row, first, metric) for metric in columns)] for row in others
    ]
    name = " ".join(cell for cell in _row_cells(first)[:4] if cell)
    title = f"Differences to {name} over the same images, {LEVEL:.0%} intervals:"
    return [title, table([*ROW_HEADINGS[:4], *(metric.heading for metric in columns)], body)]


def _difference(row: Mapping[str, Any], other: Mapping[str, Any], metric: Metric) -> str:
    """'MEAN [LOW, HIGH]' of a row minus another one; empty if a value is missing or infinite."""
    pairs = [
        (values.get(metric.key), other["images"][name].get(metric.key))
        for name, values in row["images"].items()
    ]
    if any(one is None or None in one for pair in pairs for one in pair):
        return ""
    found = bootstrap(np.array([np.mean(ours) - np.mean(theirs) for ours, theirs in pairs]))
    mean, low, high = (metric.format(found[key], signed=True) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


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


def _model_lines(report: Mapping[str, Any]) -> list[str]:
    """One line per model, with the hash of its weights."""
    return [
        f"{model['label']}: {model['name']}, {model['scale']}x, {model['parameters'] / 1e6:.2f} M parameters, "
        f"sha256 {model['sha256'][:16]}{_label_phrase(model)}."
        for model in report["models"]
    ]


def _label_phrase(model: Mapping[str, Any]) -> str:
    if model.get("labeled"):
        return ", conditioned on the label of each image"
    label = model.get("given_label")
    return "" if label is None else f", conditioned on label {label} for all images"


_DEGRADATIONS = {
    "clean": "downsampled by anti-aliased bicubic",
    "photo": "degraded as photographs are (preset photo), with a seed from its pixels",
    "wild": "degraded as in Real-ESRGAN (preset wild), with a seed from its pixels",
}


def protocol(report: Mapping[str, Any]) -> list[str]:
    """How the metrics were computed, one sentence per line."""
    settings = report["protocol"]
    sets = settings.get("sets")
    lines = _images_protocol(settings) if sets is None else []
    for one in sets or ():
        lines.append(f"{one['label']}: N = {one['images']} images in {one['folder']}.")
    columns = reported_metrics(report["rows"])
    for metric in columns:
        detail = _protocol_detail(metric, settings)
        if metric.group == "time":
            detail += f"; {_timing(report)}"
        lines.append(f"{metric.heading}: {metric.protocol}{detail}.")
    lines += _set_protocol(report, columns)
    lines += settings.get("omitted", [])
    if sets is not None:
        return lines
    return [
        *lines,
        "NFE: network function evaluations per image.",
        f"Means over images; {LEVEL:.0%} intervals from {RESAMPLES} bootstrap resamples of the images.",
    ]


def _images_protocol(settings: Mapping[str, Any]) -> list[str]:
    """Which images were evaluated, their low-res images, and the outputs of other programs."""
    count, samples = settings["images"], settings["samples"]
    crop = f", the center {settings['crop']}x{settings['crop']} of each" if settings["crop"] else ""
    per_image = f"{samples} outputs each" if samples > 1 else "one output each"
    degradation = settings.get("degradation", "clean")
    made = (
        "ground truth cropped at the bottom and right to a multiple of the scale, "
        f"{_DEGRADATIONS.get(degradation)}, rounded to 8 bits"
    )
    lines = [
        f"{count} image{'s' * (count != 1)} of {settings['source']}{crop}, {per_image}, seed "
        f"{settings['seed']}.",
        f"low-res: {'those of the pairs, as they are' if degradation == 'pairs' else made}.",
    ]
    for label, folder in settings.get("programs", {}).items():
        lines.append(f"{label}: the images in {folder}, made by another program.")
    return lines


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
        same = f" N = {features['count']} in every row;" if features["count"] else ""
        return (
            f", {features['reference'] or 'which is their own ground truth'}{patches};{same} {_network(features)}, "
            f"{features['preprocessing']}; it depends on N, so compare rows of one table only"
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
    scale = f"{row['scale']}x" if row["scale"] else ""
    return [row["method"], scale, solver, *(_text(row[key]) for key in ("steps", "nfe"))]


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
