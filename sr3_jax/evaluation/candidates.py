"""Candidates of a schedule search: their metrics on crops, and the search for the best one.

The paper searches its inference schedules by FID on held-out data (section 2.4) and does not describe the search.
Here each solver is searched at a fixed budget of network function evaluations (NFE) by successive halving. The
candidates are the solver's defaults and points that cover end points, spacing and variance evenly. In the first round
all are evaluated on a few images; the better half goes on to a round with more images, and so on. The winner is then
moved along one setting at a time, by smaller and smaller steps, while that helps. Every candidate sees the same images
and the same noise, so that few images suffice to distinguish candidates.

Shape legend: N crops of C x C pixels, B of them in a batch, D features. Images are uint8.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.data.crops import Crops
from sr3_jax.diffusion.schedule import LEAST_LOG_SNR, SPACINGS, NoiseSchedule
from sr3_jax.diffusion.solvers import solver_options
from sr3_jax.errors import UserError
from sr3_jax.evaluation.inputs import degradation_seed
from sr3_jax.features.metric_suite import Batch, Columns, MetricSuite, low_res_of
from sr3_jax.features.statistics import frechet_distance, statistics_of
from sr3_jax.files import append_jsonl, read_jsonl, sentence, sha256_hex
from sr3_jax.image_io.errors import printable
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.metrics import search_metric
from sr3_jax.sampling import Sampling

FRECHET = "frechet_alexnet"
CONSISTENCY_FACTOR, CONSISTENCY_SLACK = 1.5, 0.5  # of the consistency guard; the slack is in units of 1e-5
REFINEMENTS = 3  # passes of refinement; each halves the steps of the one before
MIN_WIDTH = 0.15  # of a grid in log-SNR, relative to the range of the training schedule

Objective = Callable[[Sampling, int], float]
"""(candidate, images) -> a value on the first images: lower is better, infinity excludes the candidate.

It may raise OutOfTime instead.
"""


class OutOfTime(Exception):
    """There is no time for another evaluation of the objective."""


# ---- Successive halving


@dataclass(frozen=True)
class Setting:
    """A number that the search varies.

    Attributes:
        lowest, highest: its range.
        width: the first step of the refinement.
        axis: the coordinate of the points that cover the space which determines it.
        spread: a coordinate in [0,1] -> its value: promising values get more of the points.
        tried: values to try with the solver's own grid.
    """

    lowest: float = 0.0
    highest: float = 1.0
    width: float = 0.1
    axis: int = 0
    spread: Callable[[float], float] = lambda x: x
    tried: tuple[float, ...] = ()


SETTINGS = {
    "variance": Setting(width=0.2, axis=3, tried=(0.0, 1.0)),
    # a third of the points without noise
    "eta": Setting(width=0.2, axis=3, spread=lambda x: max(0.0, 1.5 * x - 0.5), tried=(1.0, 0.5)),
    # half of them without; small values are more promising
    "augment": Setting(width=0.1, axis=4, spread=lambda x: max(0.0, 2 * x - 1) ** 2),
    "guidance": Setting(1.0, math.inf, 0.5, axis=5, spread=lambda x: 1.0 + 3.0 * x**2),
}


@dataclass(frozen=True)
class SearchSpace:
    """The sampling settings to search.

    Attributes:
        schedule: the training schedule.
        default: the solver with its own grid, at the steps of the budget. It takes part in every round, so that the
            result is never worse.
        augment, guidance: whether the network supports these settings, so that they are searched too.
    """

    schedule: NoiseSchedule
    default: Sampling
    augment: bool = False
    guidance: bool = False

    @property
    def settings(self) -> dict[str, Setting]:
        """What is searched besides the grid: options of the solver and what the network supports."""
        options = solver_options(self.default.solver)
        return {
            name: setting
            for name, setting in SETTINGS.items()
            if (name in options if name in ("variance", "eta") else getattr(self, name))
        }

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The lowest and the highest log-SNR that a grid may have."""
        highest, lowest = (float(x) for x in self.schedule.log_snr[[1, -1]])
        return max(lowest, min(LEAST_LOG_SNR, highest)), highest


def steps_for(solver: str, nfe: int) -> int:
    """The most steps of a solver within a budget of NFE; at least 1."""
    return max((steps for steps in range(1, nfe + 1) if Sampling(solver, steps).nfe <= nfe), default=1)


def minimize(
    space: SearchSpace, objective: Objective, *, candidates: int, rounds: Sequence[int], seed: int
) -> tuple[Sampling, int]:
    """The best sampling, and the number of images it was selected on.

    Args:
        candidates: how many take part in the first round.
        rounds: the number of images of each round, increasing.

    Out of time, the best of those evaluated on the most images; (default, 0) if there is none.
    """
    values: dict[int, dict[Sampling, float]] = {}

    def evaluate(candidate: Sampling, count: int) -> float:
        found = values.setdefault(count, {})
        if candidate not in found:
            found[candidate] = objective(candidate, count)
        return found[candidate]

    try:
        winner = _halve(
            list(initial_candidates(space, candidates, seed=seed)), evaluate, rounds, space.default
        )
        _refine(space, winner, lambda candidate: evaluate(candidate, rounds[-1]))
    except OutOfTime:
        pass
    counts = [count for count, found in values.items() if found]
    if not counts:
        return space.default, 0
    most = max(counts)
    # A candidate that is only as good as the default does not replace it.
    order = sorted(values[most], key=lambda candidate: candidate != space.default)
    return min(order, key=values[most].__getitem__), most


def _halve(
    candidates: list[Sampling], evaluate: Objective, rounds: Sequence[int], default: Sampling
) -> Sampling:
    for count in rounds:
        # The default first: it must have a value if time runs out.
        candidates = [default, *(candidate for candidate in candidates if candidate != default)]
        candidates.sort(key=lambda candidate: evaluate(candidate, count))
        winner = candidates[0]
        candidates = candidates[: math.ceil(len(candidates) / 2)]
    return winner


def initial_candidates(space: SearchSpace, count: int, *, seed: int) -> Iterator[Sampling]:
    """The default, other spacings and variances with its end points, and points that cover the rest evenly.

    At most `count`, all valid for the training schedule and no two equivalent.
    """
    seen: set[bytes] = set()
    for candidate in _proposals(space, seed=seed, most=10 * count):
        try:
            table = jax.tree.leaves(candidate.coefficients(space.schedule))
        except UserError:  # the schedule has no such grid
            continue
        other = np.array([candidate.augment, candidate.guidance])
        values = b"".join(np.asarray(column).tobytes() for column in (*table, other))
        if values not in seen and len(seen) < count:
            seen.add(values)
            yield candidate


def _proposals(space: SearchSpace, *, seed: int, most: int) -> Iterator[Sampling]:
    default = space.default
    yield default
    yield from (replace(default, spacing=spacing) for spacing in SPACINGS)
    for name, setting in space.settings.items():
        for value in setting.tried:
            tried: dict[str, Any] = {name: value}
            yield replace(default, **tried)
    low, high = space.log_snr_range
    for point in _even_points(6, most, seed=seed):
        spacing, log_snr_min, log_snr_max = point[:3]
        start = low + log_snr_min * (high - low) / 2
        end = start + (MIN_WIDTH + (1 - MIN_WIDTH) * log_snr_max) * (high - start)
        values: dict[str, Any] = {
            name: round(one.spread(point[one.axis]), 3) for name, one in space.settings.items()
        }
        yield replace(
            default,
            spacing=SPACINGS[int(spacing * len(SPACINGS))],
            log_snr_min=round(start, 3),
            log_snr_max=round(min(end, high), 3),
            **values,
        )


def _even_points(dimensions: int, count: int, *, seed: int) -> Iterator[list[float]]:
    """A low-discrepancy sequence in the unit cube: multiples of powers of a generalized golden ratio."""
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    start = np.random.Generator(np.random.Philox(key=seed)).random(dimensions)
    for number in range(count):
        yield [float(x) for x in (start + number * steps) % 1.0]


def _refine(space: SearchSpace, winner: Sampling, evaluate: Callable[[Sampling], float]) -> None:
    """Move one setting at a time while that helps; `evaluate` records the results."""
    low, high = space.log_snr_range
    ends = _log_snr_ends(space, winner)
    current = winner
    end = Setting(low, high, 0.1 * (high - low))
    settings = {"log_snr_min": end}
    if winner.steps > 1:
        settings["log_snr_max"] = end
    # One step has no noise to choose.
    settings |= {
        name: one
        for name, one in space.settings.items()
        if winner.steps > 1 or name not in ("variance", "eta")
    }
    for halvings in range(REFINEMENTS):
        for name, one in settings.items():
            for sign in (1, -1):
                now = getattr(current, name) if getattr(current, name) is not None else ends[name]
                value = min(max(now + sign * one.width / 2**halvings, one.lowest), one.highest)
                moved = replace(current, **{name: round(value, 3)})
                if value == now or not _is_valid(space, moved):
                    continue
                if evaluate(moved) < evaluate(current):
                    current = moved
                    break


def _log_snr_ends(space: SearchSpace, candidate: Sampling) -> dict[str, float]:
    """The end points of a candidate's grid, for those that it does not set itself."""
    levels = candidate.grid(space.schedule).log_snr
    return {"log_snr_min": float(levels[-1]), "log_snr_max": float(levels[1])}


def _is_valid(space: SearchSpace, candidate: Sampling) -> bool:
    try:
        candidate.grid(space.schedule)
    except UserError:
        return False
    return True


# ---- Metrics on crops


class CropEvaluator:
    """Metrics of sampling settings on the first crops of a set, with the same noise for all settings.

    Args:
        cache: a file of JSON lines with the metrics of every batch that was sampled.
        suite: its image metrics, and its network for the Frechet distance.
        batch_size: B, which divides the number of crops.
        degradation: how low-res images are made that the crops do not have, see `low_res_of`.
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
        degradation: str = "clean",
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._crops, self._cache = model, crops, cache
        self._metrics = [group for group in suite.image if group.supports(crops.images[0])]
        self._network = suite.network
        self._batch_size, self._seed = batch_size, seed
        self._on_batch = on_batch
        given = crops.low_res
        seeds = np.array([degradation_seed(sha256_hex(image)) for image in crops.images])
        self._low_res = (
            low_res_of(crops.images, model.scale, degradation=degradation, seeds=seeds)
            if given is None
            else given
        )
        self.count = len(crops.images)
        self.deadline = math.inf  # of time.monotonic()
        self.tried: set[Sampling] = set()
        self._settings = sha256_hex({
            "weights": params_fingerprint(model.params),
            "setup": config_fingerprint(model.config),
            "crops": sha256_hex(crops.images),
            "low_res": sha256_hex(self._low_res),
            "seed": seed,
            "batch": batch_size,
            "metrics": [group.key for group in self._metrics],
            "features": self._network.protocol.weights_sha256 if self._network else None,
            "version": __version__,
            "hardware": jax.devices()[0].device_kind,
            **({} if model.label is None else {"label": model.label}),
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
            raise UserError(f"{printable(self._cache)} {sentence(error)}") from error

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
