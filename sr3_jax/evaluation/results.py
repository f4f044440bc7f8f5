"""The results of an evaluation: merged over processes, summarized as rows, and written as evaluation.json.

Shape legend: P images, S samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.evaluation import tables
from sr3_jax.evaluation.methods import Method
from sr3_jax.evaluation.metric_suite import MetricSuite
from sr3_jax.evaluation.outputs import Result, Settings, hardware
from sr3_jax.features import set_metrics
from sr3_jax.features.cache import FeatureCache
from sr3_jax.features.lpips import LEAST_SIDE
from sr3_jax.files import to_json, write_text
from sr3_jax.metrics import METRICS

FORMAT = "sr3_jax.evaluation.2"


@dataclass(frozen=True)
class EvaluatedImage:
    """An image of the data set: its index, its name in files, its size in pixels, and one result for each method."""

    index: int
    name: str
    height: int
    width: int
    results: Sequence[Result] = ()


@dataclass(frozen=True)
class Part:
    """The results of one process, or of all: the images, and (index, reason) of those that cannot be read."""

    images: Sequence[EvaluatedImage]
    failed: Sequence[tuple[int, str]] = ()

    def write(self, folder: Path, process: int) -> None:
        """Write it to a file that `read` understands. UserError if it cannot be written."""
        write_text(_part_path(folder, process), json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path, process: int) -> Part:
        """Read the results that `write` wrote."""
        values: dict[str, Any] = json.loads(_part_path(folder, process).read_text(encoding="utf-8"))
        images = [
            EvaluatedImage(**{**image, "results": [Result(**result) for result in image["results"]]})
            for image in values["images"]
        ]
        return cls(images, [tuple(pair) for pair in values["failed"]])

    @classmethod
    def merge(cls, parts: Sequence[Part]) -> Part:
        """The parts of all processes as one, in the order of the source."""
        images = [image for part in parts for image in part.images]
        failed = [pair for part in parts for pair in part.failed]
        return cls(sorted(images, key=lambda image: image.index), sorted(failed))


def make_report(
    part: Part,
    methods: Sequence[Method],
    outputs: Path,
    suite: MetricSuite,
    settings: Settings,
    *,
    source: str,
    seconds: float,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of evaluation.json.

    Args:
        outputs: the folder of the outputs, with the cache of their features.
        source: the name of the data set.
        seconds: wall time of the evaluation.
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
    report["protocol"]["sentences"] = tables.protocol(report)
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
            key: tables.bootstrap(np.array([result.metrics[key] for result in results]).mean(axis=1))
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
        reference = f"{suite.reference_name} ({suite.reference.count} images)" if suite.reference else ""
        found["features"] = {
            "network": protocol.network,
            "sha256": protocol.weights_sha256,
            "preprocessing": protocol.preprocessing,
            "distance": protocol.distance,
            "count": sum(len(image.results[0].ground_truth_features) for image in part.images),
            "images": images,
            "patch": suite.network.patch,
            "reference": reference,
            "subset": set_metrics.SUBSET,
            "splits": set_metrics.SPLITS,
            "resamples": set_metrics.RESAMPLES,
        }
        keys = set_metrics.metric_keys(protocol)
        if not any(key in row["summary"] for row in rows for key in keys):
            reason = (
                "they need at least 2 images"
                if images < 2
                else f"some images have a side shorter than {LEAST_SIDE} pixels"
            )
            omitted.append(f"Metrics of the set ({protocol.network}) are omitted: {reason}.")
    return found | {"omitted": omitted}


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
            "config": method.model.config,
        }
        for method in first.values()
        if method.model is not None
    ]


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


def _finite_or_none(values: Sequence[float]) -> list[float | None]:
    """Values for JSON, which has no infinity."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _part_path(folder: Path, process: int) -> Path:
    return folder / f"part.{process}.json"
