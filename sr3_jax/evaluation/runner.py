"""The evaluation of models and of other programs' outputs on held-out images.

`evaluate` runs everything and writes the results. Images of one size are processed in batches, each by all methods.
Finished outputs and their metrics are cached, so that an interrupted evaluation continues where it stopped. Several
processes divide the images; the first one merges their results.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.data.sources import Source, open_source
from sr3_jax.degradations import PRESETS
from sr3_jax.distributed.processes import wait_for_all
from sr3_jax.errors import UserError
from sr3_jax.evaluation import results
from sr3_jax.evaluation.cache import EvaluatedImage, FeatureCache, Part
from sr3_jax.evaluation.inputs import GroundTruth
from sr3_jax.evaluation.outputs import (
    Method,
    MethodRunner,
    Settings,
    bicubic,
    ground_truth,
    model_methods,
    program_outputs,
    read_output,
    unique_labels,
)
from sr3_jax.evaluation.sets import is_source, with_reference
from sr3_jax.features.classifiers import Classifier
from sr3_jax.features.lpips import LEAST_SIDE
from sr3_jax.features.metric_suite import MetricSuite, least_side, open_suite
from sr3_jax.features.statistics import save_statistics, statistics_of
from sr3_jax.files import make_folder, unique_file_name
from sr3_jax.image_io.grid import grid_row, image_grid
from sr3_jax.image_io.image_file import DecodedImage, ImageError, write_image
from sr3_jax.inference.loading import load
from sr3_jax.inference.model import Model
from sr3_jax.inference.program import OnStep
from sr3_jax.metrics import METRICS
from sr3_jax.numerics import fixed_numerics
from sr3_jax.storage import as_path

DEFAULT_SCALE = 4  # where neither models nor pairs have one
_CACHE_MB = 256  # images are read up to three times: for their size, for their metrics and for the grids


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        report: the content of evaluation.json as plain values; its rows are those of `results.summarize`.
        files: the written files: evaluation.json, .md and .csv, then the image grids.
        failed: 'NAME: reason' of images that could not be used.
        reused: how many outputs came from the cache.
    """

    report: Mapping[str, Any]
    files: tuple[Path, ...]
    failed: tuple[str, ...]
    reused: int

    def markdown(self) -> str:
        """The tables and the protocol, as in evaluation.md."""
        return results.markdown(self.report)


@fixed_numerics()
def evaluate(
    models: Sequence[Model | str | Path],
    data: Source | str,
    output_dir: str | Path,
    *,
    steps: Sequence[int] = (),
    solvers: Sequence[str] = (),
    samples: int = 1,
    seed: int = 0,
    batch_size: int = 1,
    limit: int | None = None,
    crop: int | None = None,
    unsearched: bool = False,
    use_labels: bool = True,
    label: int | None = None,
    classifier: str | None = None,
    features: str | None = None,
    patch: int = 0,
    reference: str | Path | None = None,
    save_reference: Path | None = None,
    degradation: str = "clean",
    outputs: Mapping[str, str | Path] | None = None,
    scale: int | None = None,
    command: Sequence[str] = (),
    process: tuple[int, int] = (0, 1),
    on_output: Callable[[int, int], None] = lambda count, total: None,
    on_step: OnStep | None = None,
) -> Evaluation | None:
    """Evaluate models and the outputs of other programs on held-out images, next to bicubic interpolation.

    Each image is downsampled, upscaled by each model with each solver and number of steps, and compared with the
    ground truth. `output_dir` gets evaluation.json, .md and .csv, image grids and, in outputs/, every output. The
    same call continues an interrupted evaluation. An output depends on the seed, its ground truth and the index of
    the sample only, not on the other images and methods.

    Args:
        models: models, or what `load` takes: shipped names, workdirs, .safetensors files.
        data: a source, or its name: photos:test, tfds:NAME[/CONFIG]:SPLIT, folder:PATH or pairs:LR_DIR:HR_DIR.
        steps, solvers: of the samplers; empty for those of each model's default.
        samples: outputs of each image and model.
        batch_size: outputs sampled at once; images of one size share a batch.
        limit: only the first images.
        crop: only the center of each image, this many pixels squared.
        unsearched: next to a sampler that a schedule search found, also evaluate its solver and steps without it.
        use_labels: class-conditional models receive the labels of the images, if these have any.
        label: the class of all images, for class-conditional models, if the images have no labels.
        classifier: for accuracy: a .safetensors or .onnx file, or MODULE:FUNCTION.
        features: network of the Frechet distance and KID: inception:FILE, alexnet, classifier or none; None for
            AlexNet if its weights are installed.
        patch: compare the features of patches of this many pixels squared; 0: of whole images.
        reference: compare the set with these images instead of the ground truth: the name of a data source, or a file
            of statistics.
        save_reference: where to write the statistics of the ground truth.
        degradation: how low-res images are made: 'clean' (bicubic), 'photo' or 'wild' (`degradations.PRESETS`). Pairs
            have their own.
        outputs: folders with another program's output for each image, by the name of the program. File names match as
            `sr3_jax.data.matching` says, and sizes are those of the ground truth.
        scale: of `outputs`; None for that of the pairs or the models, else DEFAULT_SCALE.
        command: the command line, for evaluation.json.
        process: the index of this process and the number of processes; each takes a share of the images.
        on_output: called with the number of outputs finished since the last call, and the total of this process.
        on_step: called after each step of the samplers, see `Model.watched`.

    Returns:
        The evaluation; None on all processes but the first.

    Raises:
        UserError: an argument is invalid, no image can be used, or a file cannot be written.
    """
    started = time.perf_counter()
    if degradation not in PRESETS:
        raise UserError(f"degradation must be one of {', '.join(PRESETS)}, got {degradation!r}")
    loaded = [model if isinstance(model, Model) else load(model).watched(on_step) for model in models]
    programs = dict(outputs or {})
    if not loaded and not programs:
        raise UserError("there is nothing to evaluate: give a model or outputs")
    labels = unique_labels([model.name if isinstance(model, Model) else model for model in models], programs)
    scales = list(dict.fromkeys(model.scale for model in loaded))
    program_scale = _program_scale(scales, scale, data) if programs else None
    scales = list(dict.fromkeys([*scales, *([program_scale] if program_scale else [])]))
    least = _check_sizes(scales, crop=crop, patch=patch, save_reference=save_reference)
    source = data
    if not isinstance(source, Source):
        source = open_source(source, min_side=crop or least, cache_mb=_CACHE_MB, scale=scales[0])
    _check_pairs(source, scales, degradation)
    labeled = _has_labels(source)
    suite = open_suite(
        features=features,
        classifier=classifier,
        labeled=labeled,
        patch=patch,
        reference=None if reference is None or is_source(os.fspath(reference)) else Path(reference),
        batch_size=batch_size,
    )
    use_labels = use_labels and labeled
    _check_classes(source, loaded if use_labels else [], suite.classifier)
    if label is not None:
        loaded = _with_label(loaded, label, source, use_labels=use_labels)
    if save_reference and suite.network is None:
        raise UserError(f"save_reference={save_reference} needs a network: set features")
    compared = [ground_truth(scale) for scale in scales] if suite.of_ground_truth else []
    compared += [bicubic(scale) for scale in scales]
    for model, name in zip(loaded, labels, strict=False):
        compared += model_methods(
            model, name, solvers=solvers, steps=steps, unsearched=unsearched, use_labels=use_labels
        )
    settings = Settings(samples, seed, batch_size, limit, crop, process, degradation)
    for name, path in zip(labels[len(loaded) :], programs.values(), strict=True):
        root, names = as_path(os.path.expanduser(path)), image_names(source, settings)
        compared.append(program_outputs(name, root, source, names, scale=program_scale or DEFAULT_SCALE))
    folder = make_folder(as_path(output_dir))
    outputs_dir = make_folder(folder / "outputs")
    index, count = process
    if index == 0 and reference is not None and is_source(os.fspath(reference)):
        suite = with_reference(suite, os.fspath(reference), outputs_dir)
    part = evaluate_images(compared, source, outputs_dir, suite, settings, on_output)
    if count > 1:
        part.write(outputs_dir, index)
        wait_for_all()
        if index > 0:
            return None
        part = Part.merge([Part.read(outputs_dir, number) for number in range(count)])
    if not part.images:
        raise UserError(f"none of the images of {source.name} can be used; the first: {part.failed[0][1]}")
    is_assumed = scale is None and not loaded and source.scale is None
    assumed = f" (at an assumed scale of {DEFAULT_SCALE}, see --scale)" if is_assumed else ""
    report = results.make_report(
        part,
        compared,
        outputs_dir,
        suite,
        settings,
        pairs=source.scale is not None,
        programs={
            name: f"{path}{assumed}"
            for name, path in zip(labels[len(loaded) :], programs.values(), strict=True)
        },
        source=source.name if isinstance(data, Source) else data,
        seconds=time.perf_counter() - started,
        command=command,
    )
    written = results.write_tables(folder, report)
    written += write_grids(folder, part, compared, source, settings)
    if save_reference and suite.network is not None:
        cache = FeatureCache(outputs_dir, suite.network.protocol)
        truth = cache.get([key for image in part.images for key in image.results[0].ground_truth_features])
        width = truth.shape[1] - suite.network.logits
        save_statistics(save_reference, statistics_of(truth[:, :width], suite.network.protocol))
    return Evaluation(report, tuple(written), tuple(report["failed"]), report["outputs_reused"])


def _program_scale(scales: Sequence[int], scale: int | None, data: Source | str) -> int:
    """The scale of other programs' outputs. UserError if models of several scales leave it open."""
    if scale is not None:
        return scale
    if len(scales) > 1:
        raise UserError(
            f"outputs next to models of scales {' and '.join(map(str, scales))} need a scale: set --scale"
        )
    if scales:
        return scales[0]
    if isinstance(data, str) and data.startswith("pairs:"):
        data = open_source(data, cache_mb=0)
    return (data.scale if isinstance(data, Source) else None) or DEFAULT_SCALE


def _check_pairs(source: Source, scales: Sequence[int], degradation: str) -> None:
    """UserError if a source has low-res images of another scale, or would need others."""
    if source.scale is None:
        return
    if list(scales) != [source.scale]:
        raise UserError(
            f"{source.name} has pairs of scale {source.scale}, not {' and '.join(map(str, scales))}: use models of "
            "that scale"
        )
    if degradation != "clean":
        raise UserError(
            f"degradation={degradation} cannot be used with pairs, whose low-res images are given: omit it"
        )


def _check_sizes(scales: Sequence[int], *, crop: int | None, patch: int, save_reference: Path | None) -> int:
    """The shortest side that images may have. UserError if an option does not fit the scales."""
    least = least_side(scales)
    if crop is not None and (crop % math.lcm(*scales) or crop < least):
        raise UserError(
            f"crop={crop} must be a multiple of the scale, {math.lcm(*scales)}, and at least {least}"
        )
    if 0 < patch < LEAST_SIDE:
        raise UserError(f"patch={patch} must be at least {LEAST_SIDE} pixels")
    if save_reference and len(scales) > 1:
        raise UserError(
            f"save_reference needs models of one scale, got {' and '.join(map(str, scales))}: "
            "the ground truth is cropped to a multiple of it"
        )
    return least


def evaluate_images(
    compared: Sequence[Method],
    source: Source,
    outputs: Path,
    suite: MetricSuite,
    settings: Settings,
    on_output: Callable[[int, int], None] = lambda count, total: None,
) -> Part:
    """Run every method on this process's share of the images, with outputs in the folder `outputs`.

    Raises:
        UserError: a file cannot be written, or a model's output is not finite.
    """
    index, count = settings.process
    per_image = sum(method.num_samples(settings.samples) for method in compared)
    total = per_image * len(range(index, min(len(source), settings.limit or len(source)), count))
    features = None
    if suite.network is not None:
        features = FeatureCache(outputs, suite.network.protocol, process=index)
    images: list[EvaluatedImage] = []
    failed: list[tuple[int, str]] = []
    runners = [MethodRunner(method, outputs, suite, settings, features) for method in compared]
    for batch in _batches(source, settings):
        if isinstance(batch, tuple):
            failed.append(batch)
            on_output(per_image, total)
            continue
        truths = {
            scale: [GroundTruth.of(image.name, item, scale, settings.crop) for image, item in batch]
            for scale in {method.scale for method in compared}
        }
        found = []
        for runner in runners:
            found.append(runner.run(truths[runner.method.scale]))
            on_output(len(batch) * runner.num_samples, total)
        for (image, _), *of_image in zip(batch, *found, strict=True):
            images.append(replace(image, results=of_image))
    return Part(images, failed)


# ---- Images


def image_names(source: Source, settings: Settings) -> list[str]:
    """Unique names for files of the evaluated images, the same in all processes."""
    taken: set[str] = set()
    count = min(len(source), settings.limit or len(source))
    return [unique_file_name(Path(source.file_name(index)).stem, taken) for index in range(count)]


def _batches(
    source: Source, settings: Settings
) -> Iterator[list[tuple[EvaluatedImage, Mapping[str, Any]]] | tuple[int, str]]:
    """Up to `batch_size` images of one size, or the index of an image that cannot be read and the reason."""
    crop, batch_size, process = settings.crop, settings.batch_size, settings.process
    waiting: dict[tuple[int, int], list[tuple[EvaluatedImage, Mapping[str, Any]]]] = {}
    for index, name in enumerate(image_names(source, settings)):
        if index % process[1] != process[0]:
            continue
        try:
            item = source[index]
        except ImageError as error:
            yield index, str(error)
            continue
        height, width = item["image"].shape[:2]
        size = (crop, crop) if crop else (height, width)
        waiting.setdefault(size, []).append((EvaluatedImage(index, name, height, width), item))
        if len(waiting[size]) >= batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:  # bounds the memory
            yield waiting.pop(max(waiting, key=lambda other: len(waiting[other])))
    yield from waiting.values()


def _has_labels(source: Source) -> bool:
    """Whether the images have labels, by the first image that can be read."""
    for index in range(len(source)):
        try:
            return "label" in source[index]
        except ImageError:
            continue
    return False


def _check_classes(source: Source, models: Sequence[Model], classifier: Classifier | None) -> None:
    """Raise UserError if a network has fewer classes than the data set, before hours of sampling."""
    count = source.num_classes or 0
    for model in models:
        if 0 < model.network.num_classes < count:
            raise UserError(
                f"{source.name} has {count} classes, but model {model.name} knows {model.network.num_classes}: use "
                "images of those classes, or sample without labels (--no-labels)"
            )
    if classifier is not None and 0 < classifier.num_classes < count:
        raise UserError(
            f"{source.name} has {count} classes, but classifier {classifier.name} knows {classifier.num_classes}: "
            "use a classifier of this data set"
        )


def _with_label(models: Sequence[Model], label: int, source: Source, *, use_labels: bool) -> list[Model]:
    """Models of which the class-conditional ones get a label for all images; UserError if it would have no effect."""
    if not any(model.network.num_classes for model in models):
        raise UserError(f"label={label} needs a class-conditional model, and there is none: omit it")
    if use_labels:
        raise UserError(
            f"label={label} has no effect, since the images of {source.name} have labels: omit it"
        )
    return [replace(model, label=label) if model.network.num_classes else model for model in models]


# ---- Image grids


def write_grids(
    folder: Path, part: Part, methods: Sequence[Method], source: Source, settings: Settings
) -> list[Path]:
    """Write grid.png: the worst, median and best image by PSNR of the first model, for every model.

    Each model is shown with its `representative` method, which also ranks the images of the first model. A model with
    several solvers or numbers of steps also gets grid_LABEL.png with all of them.
    """
    groups = methods_by_model(methods)
    shown = [representative(methods, indices) for indices in groups.values()]
    psnr = np.array([np.mean(image.results[shown[0]].metrics["psnr"]) for image in part.images])
    cases = select_images(psnr)
    files = {"grid.png": shown}
    files |= {f"grid_{name}.png": indices for name, indices in groups.items() if len(indices) > 1}
    written = []
    for file, indices in files.items():
        group = [methods[index] for index in indices]
        scales = list(dict.fromkeys(method.scale for method in group))
        inputs = [
            ("low-res", "bicubic") if len(scales) == 1 else (f"low-res {s}x", f"bicubic {s}x") for s in scales
        ]
        columns = [*itertools.chain(*inputs), *(method.title for method in group), "ground truth"]
        rows = {}
        for case, place in cases.items():
            image = part.images[place]
            title = f"{case}:\n{image.name}\n{METRICS['psnr'].format(float(psnr[place]))} dB"
            rows[title] = _cells(folder / "outputs", image, group, scales, source, settings)
        pixels = image_grid(list(rows.values()), column_titles=columns, row_titles=list(rows))
        write_image(folder / file, DecodedImage(pixels))
        written.append(folder / file)
    return written


def methods_by_model(methods: Sequence[Method]) -> dict[str, list[int]]:
    """The indices of each model's methods."""
    groups: dict[str, list[int]] = {}
    for index, method in enumerate(methods):
        if not method.is_baseline:
            groups.setdefault(method.name, []).append(index)
    return groups


def representative(methods: Sequence[Method], indices: Sequence[int]) -> int:
    """The method that represents a model: its default sampler, else the first one with the most steps."""
    return max(indices, key=lambda index: (methods[index].own, methods[index].steps or 0))


def select_images(psnr: np.ndarray) -> dict[str, int]:
    """{'worst', 'median', 'best'} -> index by psnr [P]; only worst and best of two, 'only' of one."""
    order = np.argsort(psnr, kind="stable")
    cases = {"worst": int(order[0]), "median": int(order[(len(order) - 1) // 2]), "best": int(order[-1])}
    if len(order) == 1:
        return {"only": cases["worst"]}
    return cases if len(order) > 2 else {name: cases[name] for name in ("worst", "best")}


def _cells(
    outputs: Path,
    image: EvaluatedImage,
    methods: Sequence[Method],
    scales: Sequence[int],
    source: Source,
    settings: Settings,
) -> list[np.ndarray]:
    item = source[image.index]
    truths = {scale: GroundTruth.of(image.name, item, scale, settings.crop) for scale in scales}
    low_res = {scale: truth.low_res_image(scale, settings.degradation) for scale, truth in truths.items()}

    def output(method: Method) -> np.ndarray:
        return read_output(method, outputs, truths[method.scale])

    return grid_row(
        truths[scales[0]].image,
        low_res,
        {scale: output(bicubic(scale)) for scale in scales},
        [output(method) for method in methods],
    )
