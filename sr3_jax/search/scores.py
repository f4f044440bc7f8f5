"""What samplings score in a search: crops through a model in batches, every score kept in a file and found again.

Shape legend: N crops of C x C pixels, B of them in a batch. Images are uint8.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.data.crops import Crops
from sr3_jax.errors import UserError
from sr3_jax.evaluation import scoring
from sr3_jax.evaluation.measures import Measure
from sr3_jax.features.alexnet_features import AlexNetFeatures
from sr3_jax.features.statistics import frechet_distance, statistics_of
from sr3_jax.files import sha256_hex
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.sampling import Sampling
from sr3_jax.search.successive_halving import Score, TimeUp

HIGHER = ("psnr", "ssim", "psnr_luma", "ssim_luma")  # is better
LOWER = ("lpips", "frechet", "consistency", "mean_colour_error")
METRICS = (*HIGHER, *LOWER)
FRECHET = "frechet_alexnet"
LEAST_FRECHET = 100  # crops; of fewer, rank and bias of the covariance say more than the images
GUARD, SLACK = (
    1.5,
    0.5,
)  # the consistency of a candidate: at most GUARD times the default's, plus SLACK (1e-5)


class Ledger:
    """Values by key in a file of JSON lines; a half-written last line is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        try:
            lines = path.read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["values"]
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, key: str) -> Any | None:
        """What is kept; None if nothing is."""
        return self._known.get(key)

    def keep(self, key: str, values: Any, **about: Any) -> None:
        """Write values, with plain words about them for whoever reads the file. UserError if it cannot be written."""
        self._known[key] = values
        try:
            with self._path.open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                # A killed run may have left half a line, which must not swallow this one.
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(start + json.dumps({"key": key, **about, "values": values}).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"{printable(self._path)} cannot be written ({reason(error)}): name another -o"
            ) from error


class Judge:
    """Figures of samplings on the first so many of some crops. Every sampling sees the same noise.

    Args:
        measures: of each output.
        features: of outputs and originals, for their Frechet distance; None for none.
        batch: B; the number of crops is a multiple of it.
        on_batch: called after each batch, found or made.
    """

    def __init__(
        self,
        model: Model,
        crops: Crops,
        ledger: Ledger,
        *,
        measures: Sequence[Measure],
        features: AlexNetFeatures | None,
        batch: int,
        seed: int,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._crops, self._ledger = model, crops, ledger
        self._measures, self._features, self._batch, self._seed = measures, features, batch, seed
        self._on_batch = on_batch
        self._columns: dict[tuple[Sampling, int], Mapping[str, np.ndarray] | None] = {}
        self._low_res = scoring.low_res_of(crops.images, model.scale)
        self._originals: np.ndarray | None = None
        self.deadline = math.inf  # of time.monotonic()
        self.tried: set[Sampling] = set()
        about = {
            "weights": params_fingerprint(model.params),
            "setup": config_fingerprint(model.config),
            "crops": sha256_hex(crops.images),
            "seed": seed,
            "batch": batch,
            "measures": [measure.key for measure in measures],
            "features": features.protocol.weights_sha256 if features else None,
            "version": __version__,
            "hardware": jax.devices()[0].device_kind,
        }
        self._identity = sha256_hex(about)

    def columns(self, sampling: Sampling, count: int) -> dict[str, np.ndarray]:
        """{measure: [count]}, and 'features' [count, D] where there are any; empty if an output is not finite.

        Raises:
            TimeUp: past the deadline, with a batch still to be made.
        """
        parts = [self._part(sampling, first) for first in range(0, count, self._batch)]
        if any(part is None for part in parts):
            return {}
        whole = [part for part in parts if part is not None]
        return {name: np.concatenate([part[name] for part in whole])[:count] for name in whole[0]}

    def figures(self, sampling: Sampling, count: int) -> dict[str, float]:
        """Means of the columns, and the Frechet distance of the features."""
        columns = self.columns(sampling, count)
        features = columns.pop("features", None)
        found = {name: float(np.mean(column, dtype=np.float64)) for name, column in columns.items()}
        if features is not None and self._features is not None:
            protocol = self._features.protocol
            parts = (statistics_of(of, protocol) for of in (features, self._features_of_originals()[:count]))
            found[FRECHET] = frechet_distance(*parts)
        return found

    def _part(self, sampling: Sampling, first: int) -> Mapping[str, np.ndarray] | None:
        self.tried.add(sampling)
        if (sampling, first) not in self._columns:
            settings = dataclasses.asdict(sampling)
            key = sha256_hex({"of": self._identity, "sampling": settings, "first": first})
            kept = self._ledger.find(key)
            if kept is None:
                if time.monotonic() > self.deadline:
                    raise TimeUp
                kept = self._made(sampling, slice(first, first + self._batch))
                self._ledger.keep(key, kept, sampling=settings, first=first)
            self._columns[sampling, first] = _columns(kept)
        self._on_batch()
        return self._columns[sampling, first]

    def _made(self, sampling: Sampling, rows: slice) -> dict[str, Any]:
        """JSON's values of a batch; none of an output that is not finite."""
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
        columns: dict[str, Any] = {}
        for measure in self._measures:
            found = measure.run(outputs, self._crops.images[rows], self._low_res[rows], labels)
            columns |= {name: [_json(value) for value in column] for name, column in found.items()}
        if self._features is not None:
            features = self._features.features(outputs).astype(np.float16)
            columns["features"] = base64.b64encode(features.tobytes()).decode()
        return columns

    def _features_of_originals(self) -> np.ndarray:
        if self._originals is None and self._features is not None:
            images, batch = self._crops.images, self._batch
            parts = [self._features.features(images[i : i + batch]) for i in range(0, len(images), batch)]
            self._originals = np.concatenate(parts)
        assert self._originals is not None
        return self._originals


def score_by(judge: Judge, metric: str, *, default: Sampling, guarded: bool) -> Score:
    """The score of a search, lower is better, by one of METRICS.

    LPIPS and Frechet distances forgive an output that no longer agrees with its low-res image. A candidate that
    is less consistent than GUARD times the default (plus SLACK, about what rounding costs) is out, if `guarded`.
    """

    def score(candidate: Sampling, count: int) -> float:
        figures = judge.figures(candidate, count)
        if not figures:
            return math.inf
        if guarded:
            usual = judge.figures(default, count).get("consistency", math.inf)
            if figures["consistency"] > GUARD * usual + SLACK:
                return math.inf
        value = value_of(figures, metric)
        return -value if metric in HIGHER else value

    return score


def value_of(figures: Mapping[str, float], metric: str) -> float:
    """The figure that a metric's name on the command line stands for."""
    return figures[FRECHET if metric == "frechet" else metric]


def _json(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _columns(kept: Mapping[str, Any]) -> Mapping[str, np.ndarray] | None:
    if not kept:
        return None
    columns = {
        name: np.array([math.inf if value is None else value for value in values])
        for name, values in kept.items()
        if name != "features"
    }
    if "features" in kept:
        flat = np.frombuffer(base64.b64decode(kept["features"]), np.float16)
        columns["features"] = flat.astype(np.float32).reshape(len(next(iter(columns.values()))), -1)
    return columns
