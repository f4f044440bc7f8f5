"""The methods that an evaluation compares: bicubic interpolation and models, each with one sampler.

Shape legend: B batch, h x w a low-res image, s the scale. Images are uint8 NumPy arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
            metric_suite.bicubic_of(np.zeros(shape, np.uint8), self.scale)
        else:
            labels = np.zeros(shape[0], np.int64) if self.uses_labels else None
            self.model.compile(shape, labels=labels, sampling=self.sampling)

    def upscale(self, low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        """Low-res images uint8 [B,h,w,3], keys [B] and labels int [B] (zeros without labels) -> uint8 [B,s*h,s*w,3]."""
        if self.model is None:
            return metric_suite.bicubic_of(low_res, self.scale)
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
                    sampling, spacing=None, log_snr_min=None, log_snr_max=None, variance=1.0, eta=0.0
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
