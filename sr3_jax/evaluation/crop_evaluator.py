"""The metrics of a schedule search: sampling settings evaluated on crops of held-out images, batch by batch, cached.

Shape legend: N crops of C x C pixels, B of them in a batch, D features. Images are uint8.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.data.crops import Crops, crops_of, halves
from sr3_jax.data.sources import Source, open_source, squares
from sr3_jax.errors import UserError
from sr3_jax.evaluation.metric_suite import Batch, Columns, MetricSuite, least_side, low_res_of, open_suite
from sr3_jax.evaluation.successive_halving import Objective, OutOfTime
from sr3_jax.features.lpips import LEAST_SIDE
from sr3_jax.features.networks import open_network
from sr3_jax.features.statistics import frechet_distance, statistics_of
from sr3_jax.files import append_jsonl, read_jsonl, sha256_hex
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.metrics import search_metric
from sr3_jax.sampling import Sampling

FRECHET = "frechet_alexnet"
MAX_BATCH = 8
CROPS, CROPS_FRECHET = 32, 128  # by default
MIN_CROPS_FRECHET = 100  # with fewer, rank and bias of the covariance outweigh the images
CONSISTENCY_FACTOR, CONSISTENCY_SLACK = 1.5, 0.5  # of the consistency guard; the slack is in units of 1e-5


class CropEvaluator:
    """Metrics of sampling settings on the first crops of a set, with the same noise for all settings.

    Args:
        cache: a file of JSON lines with the metrics of every batch that was sampled.
        suite: its image metrics, and its network for the Frechet distance.
        batch_size: B, which divides the number of crops.
        on_batch: called after each batch, cached or sampled.
    """

    def __init__(
        self,
        model: Model,
        crops: Crops,
        cache: Path,
        *,
        suite: MetricSuite,
        batch_size: int,
        seed: int,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._crops, self._cache = model, crops, cache
        self._metrics = [group for group in suite.image if group.supports(crops.images[0])]
        self._network = suite.network
        self._batch_size, self._seed = batch_size, seed
        self._on_batch = on_batch
        self._low_res = low_res_of(crops.images, model.scale)
        self.count = len(crops.images)
        self.deadline = math.inf  # of time.monotonic()
        self.tried: set[Sampling] = set()
        self._settings = sha256_hex({
            "weights": params_fingerprint(model.params),
            "setup": config_fingerprint(model.config),
            "crops": sha256_hex(crops.images),
            "seed": seed,
            "batch": batch_size,
            "metrics": [group.key for group in self._metrics],
            "features": self._network.protocol.weights_sha256 if self._network else None,
            "version": __version__,
            "hardware": jax.devices()[0].device_kind,
        })  # fmt: skip
        self._batches = {
            line["key"]: _decode(line["values"]) for line in read_jsonl(cache) if _is_entry(line)
        }

    def per_crop(self, sampling: Sampling, count: int) -> dict[str, np.ndarray]:
        """{metric: [count]}, and 'features' [count,D] if there is a network; empty if an output is not finite.

        Raises:
            OutOfTime: a batch is missing and the deadline has passed.
        """
        batches = [self._batch(sampling, first) for first in range(0, count, self._batch_size)]
        if not all(batches):
            return {}
        return {name: np.concatenate([batch[name] for batch in batches])[:count] for name in batches[0]}

    def means(self, sampling: Sampling, count: int) -> dict[str, float]:
        """Means over crops, and the Frechet distance of the features; empty if an output is not finite."""
        columns = self.per_crop(sampling, count)
        features = columns.pop("features", None)
        found = {name: float(np.mean(column, dtype=np.float64)) for name, column in columns.items()}
        if features is not None and self._network is not None:
            both = (features, self._ground_truth_features[:count])
            found[FRECHET] = frechet_distance(*(statistics_of(one, self._network.protocol) for one in both))
        return found

    def _batch(self, sampling: Sampling, first: int) -> Columns:
        self.tried.add(sampling)
        settings = dataclasses.asdict(sampling)
        key = sha256_hex({"of": self._settings, "sampling": settings, "first": first})
        if key not in self._batches:
            if time.monotonic() > self.deadline:
                raise OutOfTime
            values = self._sample(sampling, slice(first, first + self._batch_size))
            self._write({"key": key, "sampling": settings, "first": first, "values": values})
            self._batches[key] = _decode(values)
        self._on_batch()
        return self._batches[key]

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            append_jsonl(self._cache, [line])
        except OSError as error:
            raise UserError(
                f"{printable(self._cache)} cannot be written ({reason(error)}): choose another folder with -o"
            ) from error

    def _sample(self, sampling: Sampling, rows: slice) -> dict[str, Any]:
        """The metrics of a batch as JSON values; empty if an output is not finite."""
        root = jax.random.key(self._seed)
        numbers = np.arange(rows.start, rows.stop)
        keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)
        known = self._crops.labels
        labels = np.zeros(len(keys), np.int32) if known is None else known[rows]
        given = labels if self._model.network.num_classes and known is not None else None
        try:
            outputs = self._model.upscale(self._low_res[rows], keys, labels=given, sampling=sampling)
        except FloatingPointError:
            return {}
        values: dict[str, Any] = {}
        for group in self._metrics:
            columns = group.compute(Batch(outputs, self._crops.images[rows], self._low_res[rows], labels))
            values |= {name: [_six_digits(value) for value in column] for name, column in columns.items()}
        if self._network is not None:
            features = self._network.run(outputs).astype(np.float16)
            values["features"] = base64.b64encode(features.tobytes()).decode()
        return values

    @functools.cached_property
    def _ground_truth_features(self) -> np.ndarray:
        assert self._network is not None
        images, size = self._crops.images, self._batch_size
        return np.concatenate([
            self._network.run(images[start : start + size]) for start in range(0, len(images), size)
        ])  # fmt: skip


def cost(values: Mapping[str, float | None], metric: str) -> float:
    """The value of a metric (one of SEARCH_METRICS) among others, negated if higher is better; inf without values."""
    if not values:
        return math.inf
    chosen = search_metric(metric)
    value = values[chosen.key]
    value = math.inf if value is None else value
    return -value if chosen.higher_is_better else value


def objective(evaluator: CropEvaluator, metric: str, *, default: Sampling, guarded: bool) -> Objective:
    """The objective that a search minimizes: the `cost` by one of SEARCH_METRICS.

    LPIPS and Frechet distance tolerate an output that no longer agrees with its low-res image. If `guarded`, a
    candidate that is much less consistent than the default (by CONSISTENCY_FACTOR, plus CONSISTENCY_SLACK, about
    the effect of rounding) is infinitely bad.
    """

    def evaluate(candidate: Sampling, count: int) -> float:
        means = evaluator.means(candidate, count)
        if means and guarded:
            usual = evaluator.means(default, count).get("consistency", math.inf)
            if means["consistency"] > CONSISTENCY_FACTOR * usual + CONSISTENCY_SLACK:
                return math.inf
        return cost(means, metric)

    return evaluate


def open_search_suite(metric: str, crop: int) -> MetricSuite:
    """The metrics to compute for a search by `metric`, with AlexNet's features if it needs them.

    Raises:
        UserError: the metric needs larger crops, or weights that are not installed.
    """
    if metric == "lpips" and crop < LEAST_SIDE:
        raise UserError(
            f"metric=lpips needs crop={LEAST_SIDE} or more pixels, got {crop}: use another metric or larger crops"
        )
    suite = open_suite(features="none")
    if metric in ("lpips", "frechet") and suite.lpips is None:
        raise UserError(f"metric={metric} is not available, use another one. {suite.omitted[0]}")
    return (
        replace(suite, network=open_network("alexnet", lpips=suite.lpips)) if metric == "frechet" else suite
    )


def open_crops(
    model: Model,
    data: str,
    eval_data: str | None,
    *,
    metric: str,
    crop: int,
    count: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[tuple[Crops, Crops], int]:
    """The crops to search on, those to check the result on, and a batch size that divides both numbers.

    Args:
        data, eval_data: names of sources; without the second, every other image of the first is used for the check.
        count: crops of each set; None for the metric's default.
        limit: only the first images of `data`.

    Raises:
        UserError: there are too few crops, or their size does not fit the model or the images.
    """
    least = least_side([model.scale])
    if crop % model.scale or crop < least:
        raise UserError(f"crop={crop} must be a multiple of the scale, {model.scale}, and at least {least}")
    section = model.config["data"]
    square, shrink = section["framing"] == "square", section["shrink"]

    def opened(name: str) -> Source:
        side = crop * shrink
        return squares(open_source(name, cache_mb=0), side) if square else open_source(name, min_side=side)

    first = opened(data)
    images = range(min(len(first), limit or len(first)))
    if eval_data:
        second = opened(eval_data)
        indices = list(images), list(range(len(second)))
    else:
        second, indices = first, halves(len(images))
        if not indices[1]:
            raise UserError(
                f"data={data} has only one usable image and none is left for the check: set eval_data"
            )
    count = count or (CROPS_FRECHET if metric == "frechet" else CROPS)
    found = [
        shrunk(crops_of(source, chosen, crop=crop * shrink, count=count, seed=seed), shrink)
        for source, chosen in zip((first, second), indices, strict=True)
    ]
    fewest = min(len(crops.images) for crops in found)
    if metric == "frechet" and fewest < MIN_CROPS_FRECHET:
        raise UserError(
            f"metric=frechet needs {MIN_CROPS_FRECHET} crops to search on and as many to check on, got {fewest}: use "
            "smaller crops, more crops or more images"
        )
    batch_size = min(MAX_BATCH, fewest)
    return (found[0].whole_batches(batch_size), found[1].whole_batches(batch_size)), batch_size


def shrunk(crops: Crops, factor: int) -> Crops:
    """The crops downsampled as the stage of a cascade was trained on them (`config.data.shrink`)."""
    if factor == 1:
        return crops
    return replace(crops, images=np.asarray(to_uint8(degrade(to_unit(crops.images), factor))))


def _is_entry(line: Any) -> bool:
    return (
        isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("values"), dict)
    )


def _six_digits(value: float) -> float | None:
    """A number for JSON, which has no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _decode(values: Mapping[str, Any]) -> Columns:
    """What `_sample` gave, as arrays."""
    columns = {
        name: np.array([math.inf if value is None else value for value in column])
        for name, column in values.items()
        if name != "features"
    }
    if "features" in values:
        flat = np.frombuffer(base64.b64decode(values["features"]), np.float16)
        columns["features"] = flat.astype(np.float32).reshape(len(next(iter(columns.values()))), -1)
    return columns
