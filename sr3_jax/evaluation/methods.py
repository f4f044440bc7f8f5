"""The methods that an evaluation compares: bicubic interpolation and models, each with one sampler.

Shape legend: B batch, h x w a low-res image, s the scale. Images are uint8 NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.evaluation import metric_suite
from sr3_jax.files import sha256_hex, unique_file_name
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import config_fingerprint, params_fingerprint
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

GROUND_TRUTH, BICUBIC = "ground truth", "bicubic"  # names in tables

Upscale = Callable[[np.ndarray, Key, np.ndarray], np.ndarray]
"""(low_res uint8 [B,h,w,3], keys [B], labels int [B], zeros without labels) -> uint8 [B,s*h,s*w,3] on the host."""
Compile = Callable[[tuple[int, ...]], None]
"""Compile the `Upscale` of low-res images of this shape [B,h,w,3], so that the next call only runs it."""


@dataclass(frozen=True, eq=False)
class Method:
    """A way to upscale: one row of the table.

    Attributes:
        name: 'ground truth', 'bicubic' or the model's label.
        upscale: None for the ground truth, whose row has the metrics of a perfect method.
        settings: plain values that determine the outputs; outputs of other settings are not reused.
        compile: compiles `upscale` ahead of time, so that compilation is not timed.
        solver, steps: None without a sampler.
        detail: the sampler's settings other than its solver's defaults, in words.
        nfe: network evaluations per image.
        own: whether this is the model's own default sampler.
        uses_labels: whether `upscale` uses the labels of the images.
    """

    name: str
    scale: int
    upscale: Upscale | None
    settings: Mapping[str, Any]
    compile: Compile = lambda shape: None
    solver: str | None = None
    steps: int | None = None
    detail: str = ""
    nfe: int = 0
    own: bool = False
    uses_labels: bool = False

    @property
    def folder(self) -> str:
        """The folder of its outputs, relative to that of all outputs."""
        if not self.solver:
            return f"{self.name.replace(' ', '_')}/{self.scale}x"
        suffix = f"-{sha256_hex(self.settings['sampling'])[:8]}" if self.detail else ""
        return f"{self.name}/{self.solver.replace(':', '_')}-{self.steps}{suffix}"

    @property
    def title(self) -> str:
        """Its name in an image grid."""
        return f"{self.name} {self.solver} {self.steps} steps" if self.solver else self.name

    def num_samples(self, requested: int) -> int:
        """The number of outputs per image: one for a deterministic method without a sampler."""
        return requested if self.solver else 1


def ground_truth(scale: int) -> Method:
    """The ground truth itself."""
    return Method(GROUND_TRUTH, scale, None, {GROUND_TRUTH: scale})


def bicubic(scale: int) -> Method:
    """Bicubic interpolation, the baseline."""

    def upscale(low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        return metric_suite.bicubic_of(low_res, scale)

    def compile(shape: tuple[int, ...]) -> None:
        metric_suite.bicubic_of(np.zeros(shape, np.uint8), scale)

    return Method(BICUBIC, scale, upscale, {BICUBIC: scale}, compile)


def model_methods(
    model: Model,
    label: str,
    *,
    solvers: Sequence[str] = (),
    steps: Sequence[int] = (),
    unsearched: bool = False,
    use_labels: bool = False,
) -> list[Method]:
    """One method for each solver and number of steps.

    Args:
        label: the model's name in tables and folders.
        solvers, steps: empty for those of the model's default sampler.
        unsearched: if the default sampler was found by a schedule search, also add the same solver and steps
            without it.
        use_labels: the images have labels, which a class-conditional model receives.

    Raises:
        UserError: the solver or number of steps is invalid for this model.
    """
    if model.network.regression:  # one pass, whatever is requested for the others
        method = model_method(model, label, Sampling(model.sampling.solver, 1), use_labels=use_labels)
        return [dataclasses.replace(method, solver=None, steps=None, nfe=1, own=True)]
    weights = fingerprint(model)
    found = []
    for solver in solvers or [model.sampling.solver]:
        for count in steps or [model.sampling.steps]:
            sampling = model.sampling.override(solver=solver, steps=count)
            default = Sampling(solver, count, guidance=sampling.guidance, augment=sampling.augment)
            choices = [default, sampling] if unsearched and default != sampling else [sampling]
            found += [
                model_method(model, label, choice, weights=weights, use_labels=use_labels)
                for choice in choices
            ]
    return found


def model_method(
    model: Model, label: str, sampling: Sampling, *, weights: str | None = None, use_labels: bool = False
) -> Method:
    """A model with one sampler.

    Args:
        weights: `fingerprint(model)`, if it is known.
        use_labels: as for `model_methods`.

    Raises:
        UserError: the model's noise schedule has no such sampling grid.
    """
    try:
        sampling.grid(model.schedule)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error

    conditional = bool(use_labels and model.network.num_classes)

    def upscale(low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        given = labels if conditional else None
        try:
            return np.asarray(model.upscale(low_res, keys, labels=given, sampling=sampling))
        except FloatingPointError as error:  # no metric of a broken output would mean anything
            raise UserError(f"{error} ({sampling.solver}, {sampling.steps} steps)") from error

    def compile(shape: tuple[int, ...]) -> None:
        labels = np.zeros(shape[0], np.int64) if conditional else None
        model.compile(shape, labels=labels, sampling=sampling)

    values = dataclasses.asdict(sampling)
    defaults = dataclasses.asdict(Sampling(sampling.solver, sampling.steps))
    return Method(
        label,
        model.scale,
        upscale,
        {
            "weights": weights or fingerprint(model),
            "setup": config_fingerprint(model.config),
            "sampling": values,
        },
        compile,
        solver=sampling.solver,
        steps=sampling.steps,
        detail=", ".join(_setting(name, value) for name, value in values.items() if value != defaults[name]),
        nfe=sampling.nfe,
        own=sampling == model.sampling,
        uses_labels=conditional,
    )


def _setting(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def fingerprint(model: Model) -> str:
    """SHA-256 of a model's weights."""
    return params_fingerprint(model.params)


def unique_labels(names: Sequence[str | Path]) -> list[str]:
    """A short unique label for each model path or name: its last component, safe as a file name."""
    taken = {BICUBIC, GROUND_TRUTH.replace(" ", "_")}
    return [unique_file_name(Path(name).resolve().name.removesuffix(".safetensors"), taken) for name in names]


def total_outputs(methods: Sequence[Method], *, images: int, samples: int) -> int:
    """The number of outputs of all methods for this many images."""
    return images * sum(method.num_samples(samples) for method in methods)
