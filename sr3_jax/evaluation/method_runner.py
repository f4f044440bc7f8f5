"""One method on a batch of images: its outputs come from the cache or are sampled, and their metrics are computed.

Shape legend: B batch, H x W the ground truth, h x w its low-res image, s the scale, S samples. A batch is always
padded to B with copies: another shape would be another program, which may round differently.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import numpy as np

from sr3_jax.evaluation.cache import Output, OutputCache
from sr3_jax.evaluation.methods import Method
from sr3_jax.evaluation.metric_suite import ImageMetrics, MetricSuite, low_res_of, stack_padded
from sr3_jax.features.cache import FeatureCache
from sr3_jax.features.networks import Network
from sr3_jax.files import sha256_hex
from sr3_jax.types import Key

_MIN_PATCHES = 8  # whose features are computed at once, at least

Place = tuple[int, int]  # index of the ground truth in the batch, index of the sample


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground-truth image uint8 [H,W,3] at a method's scale, with the hash of its pixels and its label."""

    name: str
    image: np.ndarray
    hash: str
    label: int


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


class MethodRunner:
    """Runs one method and computes its metrics; `run` takes up to `batch_size` images of one size."""

    def __init__(
        self,
        method: Method,
        cache: OutputCache,
        suite: MetricSuite,
        *,
        samples: int,
        seed: int,
        batch_size: int,
        features: FeatureCache | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.method, self.num_samples = method, method.num_samples(samples)
        self._cache, self._suite = cache, suite
        self._image_metrics = [one for one in suite.image if method.upscale or one.of_ground_truth]
        self._seed, self._batch_size = seed, batch_size
        self._features, self._pool = features, pool
        self._compiled: set[tuple[int, ...]] = set()

    def run(self, truths: Sequence[GroundTruth]) -> list[Result]:
        """All samples of up to B images of one size: from the cache where possible, else sampled."""
        places = [(index, sample) for index in range(len(truths)) for sample in range(self.num_samples)]
        outputs: dict[Place, Output] = {}
        images: dict[Place, np.ndarray] = {}
        for index, sample in places:
            cached = self._cache.find(truths[index].name, sample, self._input_hash(truths[index]))
            if cached is not None:
                outputs[index, sample] = cached
        reused = [
            sum((index, sample) in outputs for sample in range(self.num_samples))
            for index in range(len(truths))
        ]
        for chunk in self._chunks([place for place in places if place not in outputs]):
            batch, seconds = self._sample(truths, chunk)
            for (index, sample), image in zip(chunk, batch, strict=False):
                images[index, sample] = image
                truth = truths[index]
                outputs[index, sample] = Output(
                    truth.name, sample, self._input_hash(truth), sha256_hex(image), seconds=seconds
                )
            self._complete(truths, chunk, batch, outputs, new=True)
        incomplete = [
            (index, sample) for index, sample in places
            if self._missing_metrics(truths[index], outputs[index, sample])
            or (sample == 0 and self._needs_features(truths[index], outputs[index, 0].pixels))
        ]  # fmt: skip
        for chunk in self._chunks(incomplete):
            for index, sample in chunk:
                images[index, sample] = self._read(truths[index], sample)
            batch = stack_padded([images[place] for place in chunk], self._batch_size)
            self._complete(truths, chunk, batch, outputs, new=False)
        self._add_features([
            (truth.image, self._feature_keys(truth, truth.hash))
            for truth in truths
            if self._needs_features(truth, truth.hash)
        ])  # fmt: skip
        return [
            self._result(
                truth,
                [outputs[index, sample] for sample in range(self.num_samples)],
                {sample: images[index, sample] for at, sample in images if at == index},
                reused[index] if self.method.upscale else 0,
            )
            for index, truth in enumerate(truths)
        ]

    def _chunks(self, places: Sequence[Place]) -> Iterator[Sequence[Place]]:
        for start in range(0, len(places), self._batch_size):
            yield places[start : start + self._batch_size]

    def _input_hash(self, truth: GroundTruth) -> str:
        """A hash of everything that an output depends on besides the method's settings."""
        return f"{truth.hash} label {truth.label}" if self.method.uses_labels else truth.hash

    def _read(self, truth: GroundTruth, sample: int) -> np.ndarray:
        return truth.image if self.method.upscale is None else self._cache.read(truth.name, sample)

    def _wanted(self, truth: GroundTruth) -> dict[str, ImageMetrics]:
        """The metrics to compute for an image, by their cache keys."""
        return {one.key_for(truth.label): one for one in self._image_metrics if one.supports(truth.image)}

    def _missing_metrics(self, truth: GroundTruth, output: Output) -> dict[str, ImageMetrics]:
        return {key: one for key, one in self._wanted(truth).items() if key not in output.metrics}

    # ---- Sampling

    def _sample(
        self, truths: Sequence[GroundTruth], chunk: Sequence[Place]
    ) -> tuple[np.ndarray, float | None]:
        """Outputs [B,H,W,3] of a chunk, padded, and the seconds per output."""
        batch = stack_padded([truths[index].image for index, _ in chunk], self._batch_size)
        if self.method.upscale is None:
            return batch, None
        low_res = low_res_of(batch, self.method.scale)
        hashes = stack_padded(
            [np.uint32(int(truths[index].hash[:8], 16)) for index, _ in chunk], self._batch_size
        )
        numbers = stack_padded([np.uint32(sample) for _, sample in chunk], self._batch_size)
        keys = jax.block_until_ready(_output_keys(np.uint32(self._seed), hashes, numbers))
        labels = self._labels(truths, chunk)
        if low_res.shape not in self._compiled:
            self.method.compile(low_res.shape)
            self._compiled.add(low_res.shape)
        start = time.perf_counter()
        images = self.method.upscale(low_res, keys, labels)
        return images, (time.perf_counter() - start) / self._batch_size

    def _labels(self, truths: Sequence[GroundTruth], chunk: Sequence[Place]) -> np.ndarray:
        return stack_padded([np.int64(truths[index].label) for index, _ in chunk], self._batch_size)

    # ---- Metrics

    def _complete(
        self,
        truths: Sequence[GroundTruth],
        chunk: Sequence[Place],
        images: np.ndarray,
        outputs: dict[Place, Output],
        *,
        new: bool,
    ) -> None:
        """Compute the missing metrics and features of a chunk with pixels [B,H,W,3], and write them to the cache."""
        chunk_truths = [truths[index] for index, _ in chunk]
        missing = [
            self._missing_metrics(truth, outputs[place])
            for truth, place in zip(chunk_truths, chunk, strict=True)
        ]
        added: list[dict[str, dict[str, float]]] = [{} for _ in chunk]
        groups = dict.fromkeys(one for of_output in missing for one in of_output.values())
        if groups:
            ground_truth = stack_padded([truth.image for truth in chunk_truths], self._batch_size)
            low_res = low_res_of(ground_truth, self.method.scale)
            labels = self._labels(truths, chunk)
            for group in groups:
                columns = group.compute(images, ground_truth, low_res, labels)
                for row, of_output in enumerate(missing):
                    for key in [key for key, one in of_output.items() if one is group]:
                        added[row][key] = {name: float(column[row]) for name, column in columns.items()}
        self._add_features([
            (image, self._feature_keys(truth, outputs[place].pixels))
            for image, truth, place in zip(images, chunk_truths, chunk, strict=False)
            if place[1] == 0 and self._needs_features(truth, outputs[place].pixels)
        ])  # fmt: skip
        changed, pixels = [], []
        for place, more, image in zip(chunk, added, images, strict=False):
            outputs[place] = replace(outputs[place], metrics={**outputs[place].metrics, **more})
            if new or more:
                changed.append(outputs[place])
                pixels.append(image if new and self.method.upscale else None)
        if changed:
            self._cache.add(changed, pixels, map=self._pool.map)

    def _result(
        self, truth: GroundTruth, outputs: Sequence[Output], images: Mapping[int, np.ndarray], reused: int
    ) -> Result:
        per_sample = [
            {name: value for key in self._wanted(truth) for name, value in output.metrics[key].items()}
            | ({} if output.seconds is None else {"seconds": output.seconds})
            for output in outputs
        ]
        values = {name: [row[name] for row in per_sample] for name in per_sample[0]}
        if len(outputs) > 1:
            values |= {name: [value] for name, value in self._sample_metrics(truth, outputs, images).items()}
        return Result(
            values,
            self._feature_keys(truth, outputs[0].pixels),
            self._feature_keys(truth, truth.hash),
            reused,
        )

    def _sample_metrics(
        self, truth: GroundTruth, outputs: Sequence[Output], images: Mapping[int, np.ndarray]
    ) -> dict[str, float]:
        """The metrics of all samples of one image, cached as those of sample -S."""
        groups = [one for one in self._suite.samples if min(truth.image.shape[:2]) >= one.min_side]
        pixels = sha256_hex({"samples": [output.pixels for output in outputs]})
        together = Output(truth.name, -len(outputs), self._input_hash(truth), pixels)
        cached = self._cache.find(
            together.image, together.sample, together.ground_truth, pixels=together.pixels
        )
        known = dict(cached.metrics) if cached else {}
        missing = [one for one in groups if one.key not in known]
        if missing:
            stack = np.stack([
                images[sample] if sample in images else self._read(truth, sample)
                for sample in range(len(outputs))
            ])  # fmt: skip
            known |= {one.key: dict(one.compute(stack)) for one in missing}
            self._cache.add([replace(together, metrics=known)], [None])
        return {name: value for one in groups for name, value in known[one.key].items()}

    # ---- Features

    def _feature_keys(self, truth: GroundTruth, pixels: str) -> list[str]:
        """The keys of an image's features: the hash of its pixels, or one key per patch."""
        return feature_keys(pixels, self._suite.network, truth.image)

    def _needs_features(self, truth: GroundTruth, pixels: str) -> bool:
        network = self._suite.network
        if network is None or self._features is None or min(truth.image.shape[:2]) < network.least_side:
            return False
        return bool(self._features.missing(self._feature_keys(truth, pixels)))

    def _add_features(self, images: Sequence[tuple[np.ndarray, Sequence[str]]]) -> None:
        """Compute the features of images [H,W,3] of one size and cache them under their keys, one per patch."""
        network = self._suite.network
        if not images or network is None or self._features is None:
            return
        patches = {
            key: patch
            for image, keys in images
            for key, patch in zip(keys, network.patches(image), strict=True)
        }
        keys = list(patches)
        size = max(self._batch_size, _MIN_PATCHES if network.patch else 1)
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            features = network.run(stack_padded([patches[key] for key in chunk], size))
            self._features.add(chunk, features[: len(chunk)])


def feature_keys(pixels: str, network: Network | None, image: np.ndarray) -> list[str]:
    """The keys of the features of an image with this hash: the hash itself, or one key per patch."""
    count = 1 if network is None else len(network.patches(image))
    return [pixels] if count == 1 else [sha256_hex({pixels: patch}) for patch in range(count)]


@jax.jit
def _output_keys(seed: jax.Array, hashes: jax.Array, samples: jax.Array) -> Key:
    """Keys [B] that depend on the seed, the ground truth and the sample's index only."""

    def key(truth: jax.Array, sample: jax.Array) -> Key:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), truth), sample)

    return jax.vmap(key)(hashes, samples)
