"""The methods that an evaluation compares, their outputs, from the cache where possible, and the metrics of each image.

The folder of a method holds NAME.png for each image (NAME.2.png for its second sample) and scores.jsonl, with a line
for each output. Several processes may work in one folder: each appends to its own file, and all files are read.
An output is only reused if its method, ground truth and seed are the same and its image file is unchanged.

Shape legend: B batch, H x W the ground truth, h x w its low-res image, s the scale, S samples. Images are uint8 NumPy
arrays. A batch is always padded to B with copies: another shape would be another program, which may round differently.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.distributed.processes import hardware
from sr3_jax.errors import UserError
from sr3_jax.evaluation.cache import FeatureCache, Output, OutputCache, Result, output_path
from sr3_jax.features.metric_suite import (
    Batch,
    ImageMetrics,
    MetricSuite,
    bicubic_of,
    low_res_of,
    stack_padded,
)
from sr3_jax.files import sha256_hex, unique_file_name
from sr3_jax.image_io.image_file import read_rgb
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

GROUND_TRUTH, BICUBIC = "ground truth", "bicubic"  # names in tables
_MIN_PATCHES = 8  # whose features are computed at once, at least


# ---- Methods


@dataclass(frozen=True, eq=False)
class Method:
    """A way to upscale: one row of the table.

    Attributes:
        name: 'ground truth' (whose row has the metrics of a perfect method), 'bicubic' or the model's label.
        settings: plain values that determine the outputs; outputs of other settings are not reused.
        model, sampling: None for the ground truth and bicubic interpolation.
        uses_labels: whether the model receives the labels of the images.
    """

    name: str
    scale: int
    settings: Mapping[str, Any]
    model: Model | None = None
    sampling: Sampling | None = None
    uses_labels: bool = False

    @property
    def is_ground_truth(self) -> bool:
        return self.name == GROUND_TRUTH

    @property
    def sampler(self) -> Sampling | None:
        """Its sampling settings; None if it is deterministic: a regression model, bicubic or the ground truth."""
        return None if self.model is None or self.model.network.regression else self.sampling

    @property
    def solver(self) -> str | None:
        return self.sampler.solver if self.sampler else None

    @property
    def steps(self) -> int | None:
        return self.sampler.steps if self.sampler else None

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.sampler.nfe if self.sampler else int(self.model is not None)

    @property
    def own(self) -> bool:
        """Whether this is the model's own default sampler."""
        return self.model is not None and self.sampler in (None, self.model.sampling)

    @property
    def detail(self) -> str:
        """The sampler's settings other than its solver's defaults, in words."""
        if self.sampler is None:
            return ""
        defaults = dataclasses.asdict(Sampling(self.sampler.solver, self.sampler.steps))
        changed = {
            name: value for name, value in dataclasses.asdict(self.sampler).items() if value != defaults[name]
        }
        return ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in changed.items()
        )

    @property
    def folder(self) -> str:
        """The folder of its outputs, relative to that of all outputs."""
        if self.sampler is None:
            return f"{self.name.replace(' ', '_')}/{self.scale}x"
        suffix = f"-{sha256_hex(dataclasses.asdict(self.sampler))[:8]}" if self.detail else ""
        return f"{self.name}/{self.sampler.solver.replace(':', '_')}-{self.steps}{suffix}"

    @property
    def title(self) -> str:
        """Its name in an image grid."""
        return f"{self.name} {self.solver} {self.steps} steps" if self.sampler else self.name

    def num_samples(self, requested: int) -> int:
        """The number of outputs per image: one for a deterministic method."""
        return requested if self.sampler else 1

    def compile(self, shape: tuple[int, ...]) -> None:
        """Compile `upscale` of low-res images of this shape [B,h,w,3], so that the next call only runs it."""
        if self.model is None:
            bicubic_of(np.zeros(shape, np.uint8), self.scale)
        else:
            labels = np.zeros(shape[0], np.int64) if self.uses_labels else None
            self.model.compile(shape, labels=labels, sampling=self.sampling)

    def upscale(self, low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        """Low-res images uint8 [B,h,w,3], keys [B] and labels int [B] (zeros without labels) -> uint8 [B,s*h,s*w,3]."""
        if self.model is None:
            return bicubic_of(low_res, self.scale)
        given = labels if self.uses_labels else None
        try:
            return np.asarray(self.model.upscale(low_res, keys, labels=given, sampling=self.sampling))
        except FloatingPointError as error:  # no metric of a broken output would mean anything
            how = f" ({self.solver}, {self.steps} steps)" if self.sampler else ""
            raise UserError(f"{error}{how}") from error


def ground_truth(scale: int) -> Method:
    """The ground truth itself."""
    return Method(GROUND_TRUTH, scale, {GROUND_TRUTH: scale})


def bicubic(scale: int) -> Method:
    """Bicubic interpolation, the baseline."""
    return Method(BICUBIC, scale, {BICUBIC: scale})


def model_methods(
    model: Model,
    label: str,
    *,
    solvers: Sequence[str] = (),
    steps: Sequence[int] = (),
    unsearched: bool = False,
    use_labels: bool = False,
) -> list[Method]:
    """One method for each solver and number of steps; a regression model has one only.

    Args:
        label: the model's name in tables and folders.
        solvers, steps: empty for those of the model's default sampler.
        unsearched: if the default sampler was found by a schedule search, also add the same solver and steps
            without it.
        use_labels: the images have labels, which a class-conditional model receives.

    Raises:
        UserError: the solver or number of steps is invalid for this model.
    """
    samplings: list[Sampling] = []
    if model.network.regression:  # one pass, whatever is requested for the others
        samplings = [Sampling(model.sampling.solver, 1)]
    else:
        for solver in solvers or [model.sampling.solver]:
            for count in steps or [model.sampling.steps]:
                sampling = model.sampling.override(solver=solver, steps=count)
                default = dataclasses.replace(
                    Sampling(solver, count),
                    guidance=sampling.guidance,
                    augment=sampling.augment,
                    back_projection=sampling.back_projection,
                )
                samplings += [default, sampling] if unsearched and default != sampling else [sampling]
    fixed = {"weights": params_fingerprint(model.params), "setup": config_fingerprint(model.config)}
    found = []
    for sampling in samplings:
        try:
            sampling.grid(model.schedule)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        settings = {**fixed, "sampling": dataclasses.asdict(sampling)}
        uses_labels = bool(use_labels and model.network.num_classes)
        found.append(Method(label, model.scale, settings, model, sampling, uses_labels))
    return found


def unique_labels(names: Sequence[str | Path]) -> list[str]:
    """A short unique label for each model path or name: its last component, safe as a file name."""
    taken = {BICUBIC, GROUND_TRUTH.replace(" ", "_")}
    return [unique_file_name(Path(name).resolve().name.removesuffix(".safetensors"), taken) for name in names]


# ---- Outputs


@dataclass(frozen=True)
class Settings:
    """How all methods are run: options of `sr3_jax.evaluation.evaluate`."""

    samples: int = 1
    seed: int = 0
    batch_size: int = 1
    limit: int | None = None
    crop: int | None = None
    process: tuple[int, int] = (0, 1)
    degradation: str = "clean"


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground-truth image uint8 [H,W,3] at a method's scale, with the hash of its pixels and its label."""

    name: str
    image: np.ndarray
    hash: str
    label: int


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
        self._degradation = settings.degradation
        self._image_metrics = [
            one for one in suite.image if one.of_ground_truth or not method.is_ground_truth
        ]
        # What outputs depend on besides the method. The version stands for the code between weights and outputs.
        common = {"seed": settings.seed, "version": __version__, "batch": settings.batch_size}
        common |= {"hardware": hardware()}
        if settings.degradation != "clean":
            common |= {"degradation": settings.degradation}
        self._cache = OutputCache(
            folder / method.folder, {**method.settings, **common}, process=settings.process[0]
        )
        self._compiled: set[tuple[int, ...]] = set()

    def _low_res(self, chunk: Sequence[Place], batch: np.ndarray) -> np.ndarray:
        """Low-res images of the ground truth of a chunk, padded; a random degradation depends on its pixels only."""
        seeds = self._stack([degradation_seed(truth.hash) for truth, _ in chunk])
        return low_res_of(batch, self.method.scale, degradation=self._degradation, seeds=seeds)

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
                self._low_res(chunk, ground_truth),
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
        low_res = self._low_res(chunk, batch)
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


def degradation_seed(truth_hash: str) -> np.uint32:
    """The seed of the random degradation of an image, from the hash of its pixels."""
    return np.uint32(int(truth_hash[8:16], 16))


@jax.jit
def _output_keys(seed: jax.Array, hashes: jax.Array, samples: jax.Array) -> Key:
    """Keys [B] that depend on the seed, the ground truth and the sample's index only."""

    def key(truth: jax.Array, sample: jax.Array) -> Key:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), truth), sample)

    return jax.vmap(key)(hashes, samples)
