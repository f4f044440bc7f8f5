"""The methods that an evaluation compares, their outputs, from the cache where possible, and the metrics of each image.

The folder of a method holds NAME.png for each image (NAME.2.png for its second sample) and scores.jsonl, with a line
for each output. Several processes may work in one folder: each appends to its own file, and all files are read.
An output is only reused if its method, ground truth and seed are the same and its image file is unchanged.

Shape legend: B batch, H x W the ground truth, h x w its low-res image, s the scale, S samples. Images are uint8 NumPy
arrays. A batch is always padded to B with copies: another shape would be another program, which may round differently.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.data.matching import match_files, named
from sr3_jax.data.sources import Source, scan_folder
from sr3_jax.distributed.processes import hardware
from sr3_jax.errors import UserError
from sr3_jax.evaluation.cache import FeatureCache, Output, OutputCache, Result, file_hash, output_path
from sr3_jax.evaluation.inputs import GroundTruth, low_res_of_truths
from sr3_jax.features.metric_suite import Batch, ImageMetrics, MetricSuite, bicubic_of, stack_padded
from sr3_jax.files import sha256_hex, unique_file_name
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import ImageError, read_rgb
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.sampling import Sampling, count_steps
from sr3_jax.types import Key

GROUND_TRUTH, BICUBIC = "ground truth", "bicubic"  # names in tables
_MIN_PATCHES = 8  # whose features are computed at once, at least


# ---- Methods


@dataclass(frozen=True, eq=False)
class Method:
    """A way to upscale: one row of the table.

    Attributes:
        name: 'ground truth' (whose row has the metrics of a perfect method), 'bicubic' or the label of a model or of
            another program.
        settings: plain values that determine the outputs; outputs of other settings are not reused.
        model, sampling: None for the ground truth and bicubic interpolation.
        uses_labels: whether the model receives the labels of the images.
        files: the output of each image by its name, for the outputs of another program; None for all others.
    """

    name: str
    scale: int
    settings: Mapping[str, Any]
    model: Model | None = None
    sampling: Sampling | None = None
    uses_labels: bool = False
    files: Mapping[str, Path] | None = None

    @property
    def is_ground_truth(self) -> bool:
        return self.name == GROUND_TRUTH

    @property
    def sampler(self) -> Sampling | None:
        """Its sampling settings; None if it has one output per image, as regression models and bicubic do."""
        return None if self.model is None or self.model.network.regression else self.sampling

    @property
    def solver(self) -> str | None:
        return self.sampler.solver if self.sampler else None

    @property
    def steps(self) -> int | None:
        return self.sampler.steps if self.sampler else None

    @property
    def is_baseline(self) -> bool:
        """Whether it is the ground truth or bicubic interpolation."""
        return self.model is None and self.files is None

    @property
    def nfe(self) -> int | None:
        """Network evaluations per image; None where they are not known."""
        if self.files is not None:
            return None
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
        return f"{self.name} {self.solver} {count_steps(self.sampler.steps)}" if self.sampler else self.name

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
            how = f" ({self.sampler.words})" if self.sampler else ""
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
    fixed: dict[str, str | int] = {
        "weights": params_fingerprint(model.params),
        "setup": config_fingerprint(model.config),
    }
    fixed |= {} if model.label is None else {"label": model.label}
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


def program_outputs(label: str, folder: Path, source: Source, names: Sequence[str], *, scale: int) -> Method:
    """The outputs of another program: images of a folder, matched to those of the source by `data.matching`.

    Args:
        label: its name in tables.
        names: of the first images of the source; each needs an output, of its size or, as if upscaled from a low-res
            image, of the largest multiple of the scale in it.

    Raises:
        UserError: outputs are missing, unreadable or of another size.
    """
    try:
        scan = scan_folder(folder)
    except UserError as error:
        raise UserError(f"outputs {label}: {error}") from error
    files = [os.fspath(path.relative_to(folder)) for path in scan.images]
    wanted = [source.file_name(place) for place in range(len(names))]
    matches = match_files(wanted, files, where=os.fspath(folder))
    if missing := [path for path, match in zip(wanted, matches, strict=True) if match is None]:
        broken = [os.fspath(path.relative_to(folder)) for path, _ in scan.rejected]
        for match in match_files(missing, broken, where=os.fspath(folder)):
            if match is not None:
                path, reason = scan.rejected[match]
                raise UserError(f"outputs {label}: '{printable(path)}' {reason}: make it again")
        raise UserError(
            f"outputs {label}: {len(missing)} of {len(wanted)} images have no output in '{printable(folder)}': "
            f"{named(missing)}; add {'it' if len(missing) == 1 else 'them'}, or evaluate fewer images with --limit"
        )
    found = [match for match in matches if match is not None]
    wrong = []
    for place, match in enumerate(found):
        try:
            height, width = source[place]["image"].shape[:2]
        except ImageError:  # it is going to be skipped with its reason
            continue
        if scan.sizes[match] not in ((height, width), (height // scale * scale, width // scale * scale)):
            wrong.append((files[match], scan.sizes[match], (height, width)))
    if wrong:
        _, (height, width), (tall, wide) = wrong[0]
        raise UserError(
            f"outputs {label}: {len(wrong)} of {len(found)} images in '{printable(folder)}' do not have the size of "
            f"their ground truth: {named([file for file, *_ in wrong])}; the first has {width}x{height} pixels, "
            f"use {wide}x{tall}"
        )
    paths = {name: scan.images[match] for name, match in zip(names, found, strict=True)}
    return Method(label, scale, {"outputs": "files"}, files=paths)


def unique_labels(models: Sequence[str | Path], programs: Iterable[str] = ()) -> list[str]:
    """A short unique label for each model and program, safe as a file name: of a path, its last component."""
    taken = {BICUBIC, GROUND_TRUTH.replace(" ", "_")}
    names = [Path(model).resolve().name.removesuffix(".safetensors") for model in models]
    return [unique_file_name(name, taken) for name in (*names, *programs)]


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


def read_output(method: Method, folder: Path, truth: GroundTruth, sample: int = 0) -> np.ndarray:
    """The pixels uint8 [H,W,3] of an output, from its file.

    Args:
        folder: that of all outputs.

    Raises:
        UserError: the file of another program cannot be read, or changed its size.
    """
    if method.files is None:
        return read_rgb(output_path(folder / method.folder, truth.name, sample))
    path, (height, width) = method.files[truth.name], truth.image.shape[:2]
    try:
        image = read_rgb(path)[truth.top : truth.top + height, truth.left : truth.left + width]
    except ImageError as error:
        raise UserError(f"outputs {method.name}: '{printable(path)}' {error}: make it again") from error
    if image.shape != truth.image.shape:
        raise UserError(
            f"outputs {method.name}: '{printable(path)}' is smaller than its ground truth: make it again"
        )
    return np.ascontiguousarray(image)


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
        self._folder = folder
        self._hashes: dict[str, str] = {}
        self._cache = OutputCache(
            folder / method.folder, {**method.settings, **common}, process=settings.process[0]
        )
        self._compiled: set[tuple[int, ...]] = set()

    def _low_res(self, chunk: Sequence[Place], batch: np.ndarray) -> np.ndarray:
        truths = [truth for truth, _ in chunk]
        return low_res_of_truths(truths, batch, self.method.scale, self._degradation)

    def run(self, truths: Sequence[GroundTruth]) -> list[Result]:
        """All samples of up to B images of one size: from the cache where possible, else sampled."""
        places = [(truth, sample) for truth in truths for sample in range(self.num_samples)]
        outputs: dict[Place, Output] = {}
        for truth, sample in places:
            cached = self._cache.find(truth.name, sample, self._input_hash(truth))
            if cached is not None:
                outputs[truth, sample] = cached
        reused = [truth for truth, _ in outputs] if self._samples_outputs else []
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
        written = new if self._samples_outputs else []
        self._cache.add(
            [outputs[place] for place in chunk],
            [images[place] if place in written else None for place in chunk],
        )

    def _sample(self, chunk: Sequence[Place]) -> tuple[np.ndarray, float | None]:
        """Outputs [B,H,W,3] of a chunk, padded, and the seconds per output."""
        if not self._samples_outputs:
            return self._stack([self._image(place, {}) for place in chunk]), None
        batch = self._stack([truth.image for truth, _ in chunk])
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

    @property
    def _samples_outputs(self) -> bool:
        """Whether outputs are made and written here, not given as the ground truth and files are."""
        return not self.method.is_ground_truth and self.method.files is None

    def _stack(self, arrays: Sequence[np.ndarray | np.generic]) -> np.ndarray:
        return stack_padded(arrays, self._batch_size)

    def _input_hash(self, truth: GroundTruth) -> str:
        """A hash of everything that an output and its metrics depend on besides the method's settings."""
        if truth.name not in self._hashes:
            found = f"{truth.hash} label {truth.label}" if self.method.uses_labels else truth.hash
            if truth.low_res is not None:
                found += f" low-res {sha256_hex(truth.low_res)}"
            if self.method.files is not None:
                found += f" file {file_hash(self.method.files[truth.name])} at {truth.top}, {truth.left}"
            self._hashes[truth.name] = found
        return self._hashes[truth.name]

    def _image(self, place: Place, images: dict[Place, np.ndarray]) -> np.ndarray:
        """The pixels of an output, read from its file if they are not in `images`."""
        if place not in images:
            truth, sample = place
            given = self.method.is_ground_truth
            images[place] = truth.image if given else read_output(self.method, self._folder, truth, sample)
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
