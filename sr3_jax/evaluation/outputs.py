"""The outputs of a method: taken from the cache where possible, else sampled, and the metrics of each image.

The folder of a method holds NAME.png for each image (NAME.2.png for its second sample) and scores.jsonl, with a line
for each output. Several processes may work in one folder: each appends to its own file, and all files are read.
An output is only reused if its method, ground truth and seed are the same and its image file is unchanged.

Shape legend: B batch, H x W the ground truth, h x w its low-res image, s the scale, S samples. A batch is always
padded to B with copies: another shape would be another program, which may round differently.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.errors import UserError
from sr3_jax.evaluation.methods import Method
from sr3_jax.evaluation.metric_suite import Batch, ImageMetrics, MetricSuite, low_res_of, stack_padded
from sr3_jax.features.cache import FeatureCache
from sr3_jax.files import append_jsonl, from_json, read_jsonl, sentence, sha256_hex, to_json
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.types import Key

LINES = "scores"  # the stem of the files of JSON lines
_THREADS = 4  # that write image files
_MIN_PATCHES = 8  # whose features are computed at once, at least


@dataclass(frozen=True)
class Settings:
    """How all methods are run: options of `sr3_jax.evaluation.evaluate`."""

    samples: int = 1
    seed: int = 0
    batch_size: int = 1
    limit: int | None = None
    crop: int | None = None
    process: tuple[int, int] = (0, 1)


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground-truth image uint8 [H,W,3] at a method's scale, with the hash of its pixels and its label."""

    name: str
    image: np.ndarray
    hash: str
    label: int


@dataclass(frozen=True)
class Output:
    """A finished output: one line of the cache.

    Attributes:
        image: the name of its image.
        sample: 0 for the first; -S for metrics of all S samples together, which have no image file.
        ground_truth: hash of the ground truth, and of the label if the output depends on it.
        pixels: hash of the output's pixels.
        file: SHA-256 of its image file; None if it has none.
        seconds: the time to sample it; None if it was not timed.
        metrics: {key of the ImageMetrics or SampleMetrics: {metric: value}}.
    """

    image: str
    sample: int
    ground_truth: str
    pixels: str
    file: str | None = None
    seconds: float | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One method on one image, as plain values.

    Attributes:
        metrics: {metric: one value per sample, or one for all samples together}.
        output_features, ground_truth_features: keys of the features of the first output and of the ground truth: one,
            or one per patch.
        reused: how many outputs came from the cache.
    """

    metrics: Mapping[str, Sequence[float]]
    output_features: Sequence[str]
    ground_truth_features: Sequence[str]
    reused: int


Place = tuple[GroundTruth, int]  # an image and the index of a sample of it


class MethodRunner:
    """Runs one method and computes its metrics; `run` takes up to `batch_size` images of one size."""

    def __init__(
        self,
        method: Method,
        folder: Path,
        suite: MetricSuite,
        settings: Settings,
        features: FeatureCache | None,
    ) -> None:
        self.method, self.num_samples = method, method.num_samples(settings.samples)
        self._suite, self._features = suite, features
        self._seed, self._batch_size = settings.seed, settings.batch_size
        self._image_metrics = [
            one for one in suite.image if one.of_ground_truth or not method.is_ground_truth
        ]
        # What outputs depend on besides the method. The version stands for the code between weights and outputs.
        common = {"seed": settings.seed, "version": __version__, "batch": settings.batch_size}
        common |= {"hardware": hardware()}
        self._cache = OutputCache(
            folder / method.folder, {**method.settings, **common}, process=settings.process[0]
        )
        self._compiled: set[tuple[int, ...]] = set()

    def run(self, truths: Sequence[GroundTruth]) -> list[Result]:
        """All samples of up to B images of one size: from the cache where possible, else sampled."""
        places = [(truth, sample) for truth in truths for sample in range(self.num_samples)]
        outputs: dict[Place, Output] = {}
        for truth, sample in places:
            cached = self._cache.find(truth.name, sample, self._input_hash(truth))
            if cached is not None:
                outputs[truth, sample] = cached
        reused = [] if self.method.is_ground_truth else [truth for truth, _ in outputs]
        images: dict[Place, np.ndarray] = {}
        todo = [place for place in places if place not in outputs or self._missing(place[0], outputs[place])]
        todo.sort(key=lambda place: place in outputs)  # those to sample first, in full batches
        for start in range(0, len(todo), self._batch_size):
            self._complete(todo[start : start + self._batch_size], outputs, images)
        self._add_features(truths, outputs, images)
        return [self._result(truth, outputs, images, reused=reused.count(truth)) for truth in truths]

    def _complete(
        self, chunk: Sequence[Place], outputs: dict[Place, Output], images: dict[Place, np.ndarray]
    ) -> None:
        """Sample the missing outputs of up to B places, compute missing metrics, and write all that is new."""
        new = [place for place in chunk if place not in outputs]
        if new:
            sampled, seconds = self._sample(new)
            for (truth, sample), image in zip(new, sampled, strict=False):
                images[truth, sample] = image
                outputs[truth, sample] = Output(
                    truth.name, sample, self._input_hash(truth), sha256_hex(image), seconds=seconds
                )
        missing = [self._missing(place[0], outputs[place]) for place in chunk]
        found: list[dict[str, dict[str, float]]] = [{} for _ in chunk]
        groups = dict.fromkeys(one for of_output in missing for one in of_output.values())
        if groups:
            ground_truth = self._stack([truth.image for truth, _ in chunk])
            batch = Batch(
                self._stack([self._image(place, images) for place in chunk]),
                ground_truth,
                low_res_of(ground_truth, self.method.scale),
                self._stack([np.int64(truth.label) for truth, _ in chunk]),
            )
            for group in groups:
                columns = group.compute(batch)
                for row, of_output in enumerate(missing):
                    for key in [key for key, one in of_output.items() if one is group]:
                        found[row][key] = {name: float(column[row]) for name, column in columns.items()}
        for place, more in zip(chunk, found, strict=True):
            outputs[place] = replace(outputs[place], metrics={**outputs[place].metrics, **more})
        written = [] if self.method.is_ground_truth else new
        self._cache.add(
            [outputs[place] for place in chunk],
            [images[place] if place in written else None for place in chunk],
        )

    def _sample(self, chunk: Sequence[Place]) -> tuple[np.ndarray, float | None]:
        """Outputs [B,H,W,3] of a chunk, padded, and the seconds per output."""
        batch = self._stack([truth.image for truth, _ in chunk])
        if self.method.is_ground_truth:
            return batch, None
        low_res = low_res_of(batch, self.method.scale)
        hashes = self._stack([np.uint32(int(truth.hash[:8], 16)) for truth, _ in chunk])
        samples = self._stack([np.uint32(sample) for _, sample in chunk])
        keys = jax.block_until_ready(_output_keys(np.uint32(self._seed), hashes, samples))
        labels = self._stack([np.int64(truth.label) for truth, _ in chunk])
        if low_res.shape not in self._compiled:
            self.method.compile(low_res.shape)
            self._compiled.add(low_res.shape)
        start = time.perf_counter()
        images = self.method.upscale(low_res, keys, labels)
        return images, (time.perf_counter() - start) / self._batch_size

    def _stack(self, arrays: Sequence[np.ndarray | np.generic]) -> np.ndarray:
        return stack_padded(arrays, self._batch_size)

    def _input_hash(self, truth: GroundTruth) -> str:
        """A hash of everything that an output depends on besides the method's settings."""
        return f"{truth.hash} label {truth.label}" if self.method.uses_labels else truth.hash

    def _image(self, place: Place, images: dict[Place, np.ndarray]) -> np.ndarray:
        """The pixels of an output, read from its file if they are not in `images`."""
        if place not in images:
            truth, sample = place
            file = output_path(self._cache.folder, truth.name, sample)
            images[place] = truth.image if self.method.is_ground_truth else read_rgb(file)
        return images[place]

    def _wanted(self, truth: GroundTruth) -> dict[str, ImageMetrics]:
        """The metrics to compute for an image, by their cache keys."""
        return {one.key_for(truth.label): one for one in self._image_metrics if one.supports(truth.image)}

    def _missing(self, truth: GroundTruth, output: Output) -> dict[str, ImageMetrics]:
        return {key: one for key, one in self._wanted(truth).items() if key not in output.metrics}

    def _add_features(
        self, truths: Sequence[GroundTruth], outputs: Mapping[Place, Output], images: dict[Place, np.ndarray]
    ) -> None:
        """Compute the features of first outputs and ground truths, by patch, that are not in the cache."""
        network, cache = self._suite.network, self._features
        if network is None or cache is None or min(truths[0].image.shape[:2]) < network.least_side:
            return
        patches: dict[str, np.ndarray] = {}
        for truth in truths:
            keys = self._suite.feature_keys(truth.hash, truth.image)
            if cache.missing(keys):
                patches |= zip(keys, network.patches(truth.image), strict=True)
            keys = self._suite.feature_keys(outputs[truth, 0].pixels, truth.image)
            if cache.missing(keys):
                patches |= zip(keys, network.patches(self._image((truth, 0), images)), strict=True)
        keys = list(patches)
        size = max(self._batch_size, _MIN_PATCHES if network.patch else 1)
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            features = network.run(stack_padded([patches[key] for key in chunk], size))
            cache.add(chunk, features[: len(chunk)])

    def _result(
        self,
        truth: GroundTruth,
        outputs: Mapping[Place, Output],
        images: dict[Place, np.ndarray],
        *,
        reused: int,
    ) -> Result:
        samples = [outputs[truth, sample] for sample in range(self.num_samples)]
        per_sample = [
            {name: value for key in self._wanted(truth) for name, value in output.metrics[key].items()}
            | ({} if output.seconds is None else {"seconds": output.seconds})
            for output in samples
        ]
        values = {name: [row[name] for row in per_sample] for name in per_sample[0]}
        if len(samples) > 1:
            values |= {name: [value] for name, value in self._sample_metrics(truth, samples, images).items()}
        return Result(
            values,
            self._suite.feature_keys(samples[0].pixels, truth.image),
            self._suite.feature_keys(truth.hash, truth.image),
            reused,
        )

    def _sample_metrics(
        self, truth: GroundTruth, samples: Sequence[Output], images: dict[Place, np.ndarray]
    ) -> dict[str, float]:
        """The metrics of all samples of one image, cached as those of sample -S."""
        groups = [one for one in self._suite.samples if min(truth.image.shape[:2]) >= one.min_side]
        pixels = sha256_hex({"samples": [output.pixels for output in samples]})
        together = Output(truth.name, -len(samples), self._input_hash(truth), pixels)
        cached = self._cache.find(truth.name, together.sample, together.ground_truth, pixels=pixels)
        known = dict(cached.metrics) if cached else {}
        missing = [one for one in groups if one.key not in known]
        if missing:
            stack = np.stack([self._image((truth, sample), images) for sample in range(len(samples))])
            known |= {one.key: dict(one.compute(stack)) for one in missing}
            self._cache.add([replace(together, metrics=known)], [None])
        return {name: value for one in groups for name, value in known[one.key].items()}


@jax.jit
def _output_keys(seed: jax.Array, hashes: jax.Array, samples: jax.Array) -> Key:
    """Keys [B] that depend on the seed, the ground truth and the sample's index only."""

    def key(truth: jax.Array, sample: jax.Array) -> Key:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), truth), sample)

    return jax.vmap(key)(hashes, samples)


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


# ---- The cache


class OutputCache:
    """The outputs of one method in `folder`.

    Args:
        settings: plain values that all outputs depend on, such as weights, sampler and seed.
        process: the index of this process.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, process: int = 0) -> None:
        self.folder = folder
        self._lines = folder / (f"{LINES}.jsonl" if process == 0 else f"{LINES}.{process}.jsonl")
        self._method = sha256_hex(settings)
        # By image, sample and ground truth; of different pixels (of other processes) the latest is last.
        self._outputs: dict[tuple[str, int, str], dict[str, Output]] = {}
        for path in sorted(folder.glob(f"{LINES}*.jsonl")):
            self._read_lines(path)

    def find(self, image: str, sample: int, ground_truth: str, *, pixels: str | None = None) -> Output | None:
        """The cached output, or None.

        Args:
            ground_truth: as in `Output`.
            pixels: hash of the output, if it is known.
        """
        found = self._outputs.get((image, sample, ground_truth), {})
        for output in reversed(found.values()):
            if pixels not in (None, output.pixels):
                continue
            # Hashing the file is much faster than decoding it.
            if output.file is None or output.file == _file_hash(output_path(self.folder, image, sample)):
                return output
        return None

    def add(self, outputs: Sequence[Output], images: Sequence[np.ndarray | None]) -> None:
        """Write outputs and the pixels uint8 [H,W,3] of each; None if its file exists, or none is wanted.

        Raises:
            UserError: they cannot be written.
        """
        lines = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_THREADS, "write") as pool:
                files = list(pool.map(self._write, outputs, images))
            for output, file in zip(outputs, files, strict=True):
                output = replace(output, file=file or output.file)
                self._learn(output)
                line = {"method": self._method, "image": output.image, "sample": output.sample}
                line |= {"ground_truth": output.ground_truth, "output": output.pixels, "file": output.file}
                line |= {"seconds": output.seconds}
                line |= {"metrics": {key: to_json(values) for key, values in output.metrics.items()}}
                lines.append(line)
            append_jsonl(self._lines, lines)
        except OSError as error:
            raise UserError(f"{printable(self._lines)} {sentence(error)}") from error

    def _write(self, output: Output, image: np.ndarray | None) -> str | None:
        if image is None:
            return None
        path = output_path(self.folder, output.image, output.sample)
        try:
            write_image(path, DecodedImage(image), durable=False)  # `find` checks the file
        except ImageError as error:
            raise UserError(f"{printable(path)} {error}") from error
        return _file_hash(path)

    def _learn(self, output: Output) -> None:
        """Add an output to the index. Metrics of one output accumulate, whatever lines and files they are in."""
        found = self._outputs.setdefault((output.image, output.sample, output.ground_truth), {})
        before = found.pop(output.pixels, None)
        metrics = {**(before.metrics if before else {}), **output.metrics}
        found[output.pixels] = replace(output, metrics=metrics)

    def _read_lines(self, path: Path) -> None:
        for line in read_jsonl(path):
            try:
                if line["method"] == self._method:
                    metrics = {key: from_json(values) for key, values in line["metrics"].items()}
                    place = (line["image"], line["sample"], line["ground_truth"])
                    self._learn(Output(*place, line["output"], line["file"], line["seconds"], metrics))
            except (KeyError, TypeError, AttributeError):
                continue


def output_path(folder: Path, image: str, sample: int) -> Path:
    """The image file of a sample (0 is the first) in the folder of a method."""
    return folder / (f"{image}.png" if sample == 0 else f"{image}.{sample + 1}.png")


def _file_hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
