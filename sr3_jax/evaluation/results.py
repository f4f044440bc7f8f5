"""The results of an evaluation: merged over processes, summarized as rows, and written as evaluation.json.

Shape legend: P images, S samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.errors import UserError
from sr3_jax.evaluation import metric_suite as suites
from sr3_jax.evaluation import tables
from sr3_jax.evaluation.method_runner import Result
from sr3_jax.evaluation.methods import Method, fingerprint
from sr3_jax.evaluation.metric_suite import MetricSuite
from sr3_jax.features import set_metrics
from sr3_jax.features.cache import FeatureCache
from sr3_jax.files import to_json, write_text
from sr3_jax.inference.model import Model

FORMAT = "sr3_jax.evaluation.2"


@dataclass(frozen=True)
class EvaluatedImage:
    """An image of the data set: its index, its name in files, and its size in pixels."""

    index: int
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Part:
    """The results of one process, or of all processes, as plain values.

    Attributes:
        images: in the order of `results`.
        results: of each method, one for each image.
        failed: (index, 'NAME: reason') of images that cannot be read.
    """

    images: Sequence[EvaluatedImage]
    results: Sequence[Sequence[Result]]
    failed: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class Row:
    """The results of one method: a row of the tables, and of evaluation.json as `dataclasses.asdict` gives it.

    Attributes:
        method, scale, solver, steps, detail, nfe, own: as in `Method`.
        summary: {metric: {'mean', 'low', 'high'}}; None stands for infinity.
        images: {image: {metric: one value per sample, or one for all}}; None stands for infinity.
    """

    method: str
    scale: int
    solver: str | None
    steps: int | None
    detail: str
    nfe: int
    own: bool
    summary: Mapping[str, Mapping[str, float | None]]
    images: Mapping[str, Mapping[str, Sequence[float | None]]]


def write_part(folder: Path, part: Part, *, process: int) -> None:
    """Write the results of one process. UserError if they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(_part_path(folder, process), json.dumps(dataclasses.asdict(part)))


def read_part(folder: Path, *, process: int) -> Part:
    """Read the results that `write_part` wrote."""
    values: dict[str, Any] = json.loads(_part_path(folder, process).read_text(encoding="utf-8"))
    return Part(
        [EvaluatedImage(**image) for image in values["images"]],
        [[Result(**result) for result in of_method] for of_method in values["results"]],
        [tuple(pair) for pair in values["failed"]],
    )


def merge(parts: Sequence[Part], source: str) -> Part:
    """The results of all processes as one, images in the order of the source. UserError if no image is usable."""
    failed = sorted(pair for part in parts for pair in part.failed)
    images = [image for part in parts for image in part.images]
    if not images:
        raise UserError(f"none of the images of {source} can be used; the first: {failed[0][1]}")
    order = sorted(range(len(images)), key=lambda i: images[i].index)
    results = [
        [result for part in parts for result in part.results[method]]
        for method in range(len(parts[0].results))
    ]
    return Part([images[i] for i in order], [[of_method[i] for i in order] for of_method in results], failed)


def summarize(
    part: Part, methods: Sequence[Method], outputs: Path, *, suite: MetricSuite
) -> tuple[list[Row], dict[str, Any]]:
    """A row for each method, with the metrics of the set, and the networks' part of the protocol.

    Metrics that could not be computed for every image are left out, and the protocol says so.
    """
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for method, results in zip(methods, part.results, strict=True):
        keys = dict.fromkeys(key for result in results for key in result.metrics)
        missing = {key: sum(key not in result.metrics for result in results) for key in keys}
        left_out |= {key: number for key, number in missing.items() if number}
        complete = [key for key in keys if not missing[key]]
        summary = {
            key: tables.bootstrap(np.array([result.metrics[key] for result in results]).mean(axis=1))
            for key in complete
        }
        rows.append(
            Row(
                method.name,
                method.scale,
                method.solver,
                method.steps,
                method.detail,
                method.nfe,
                method.own,
                {
                    key: to_json(interval)
                    for key, interval in {**summary, **_set_metrics(results, method, outputs, suite)}.items()
                },
                {
                    image.name: {key: _finite_or_none(result.metrics[key]) for key in complete}
                    for image, result in zip(part.images, results, strict=True)
                },
            )
        )
    count = len(part.images)
    if suite.lpips is not None and not any("lpips" in row.summary for row in rows):
        left_out.setdefault("lpips", count)  # all images are too small
    set_keys = set_metrics.metric_keys(suite.network.protocol) if suite.network else ()
    networks = suites.describe_networks(
        suite,
        images=count,
        feature_rows=sum(len(result.ground_truth_features) for result in part.results[0]),
        has_set_metrics=any(key in row.summary for row in rows for key in set_keys),
        left_out=left_out,
    )
    return rows, networks


def _set_metrics(
    results: Sequence[Result], method: Method, outputs: Path, suite: MetricSuite
) -> Mapping[str, Mapping[str, float]]:
    """Metrics of the set by the cached features of a method; empty if some images have none."""
    if suite.network is None:
        return {}
    cache = FeatureCache.for_protocol(outputs, suite.network.protocol)
    generated = [key for result in results for key in result.output_features]
    truth = [key for result in results for key in result.ground_truth_features]
    if cache.missing([*generated, *truth]):
        return {}
    options: dict[str, Any] = {"logits": suite.network.logits, "reference": suite.reference}
    if len(truth) > len(results):
        patches = [len(result.ground_truth_features) for result in results]
        options["images"] = np.repeat(np.arange(len(results)), patches)
    protocol = suite.network.protocol
    if method.upscale is None:
        return set_metrics.ground_truth_metrics(cache.get(truth), protocol, **options)
    return set_metrics.output_metrics(cache.get(generated), cache.get(truth), protocol, **options)


def make_report(
    part: Part,
    rows: Sequence[Row],
    models: Sequence[Mapping[str, Any]],
    *,
    protocol: Mapping[str, Any],
    seconds: float,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        models: by `describe_model`.
        protocol: source, images, samples, seed, crop and the networks' part from `summarize`.
        seconds: wall time of the evaluation.
    """
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seconds": round(seconds, 1),
        "outputs_reused": sum(result.reused for results in part.results for result in results),
        "hardware": hardware(),
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "protocol": dict(protocol),
        "models": list(models),
        "images": [
            {"name": image.name, "height": image.height, "width": image.width} for image in part.images
        ],
        "failed": [reason for _, reason in part.failed],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    report["protocol"]["sentences"] = tables.protocol(report)
    return report


def write_tables(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write evaluation.json, evaluation.md and evaluation.csv. UserError if one cannot be written."""
    texts = {
        "evaluation.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "evaluation.md": tables.markdown(report),
        "evaluation.csv": tables.comma_separated(report),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def describe_model(model: Model, label: str, *, use_labels: bool = False) -> dict[str, Any]:
    """A model's entry in evaluation.json; `use_labels`: class-conditional models receive the images' labels."""
    return {
        "label": label,
        "name": model.name,
        "scale": model.scale,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(model.params)),
        "sha256": fingerprint(model),
        "labelled": bool(use_labels and model.network.num_classes),
        "config": model.config,
    }


def hardware() -> str:
    """The devices of this process, in words."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, {jax.local_device_count()} of them"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {cores} core{'s' * (cores != 1)}"


def _cpu_name() -> str:
    """The CPU's name, which the standard library does not know on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _finite_or_none(values: Sequence[float]) -> list[float | None]:
    """Values for JSON, which has no infinity."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _part_path(folder: Path, process: int) -> Path:
    return folder / f"part.{process}.json"
