"""Ways to upscale, side by side: each is a row of an evaluation's table.

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
from sr3_jax.evaluation import scoring
from sr3_jax.evaluation.bench import Run
from sr3_jax.files import sha256_hex, unique_file_name
from sr3_jax.inference import sampling_file
from sr3_jax.inference.model import Model
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key


@dataclass(frozen=True, eq=False)
class Method:
    """A way to upscale: one row of the table.

    Attributes:
        name: 'original', 'bicubic', or the model's label.
        run: what makes the outputs, back on the host; None for the originals, which stand in the table for what a
            perfect method would get.
        identity: plain values that say what `run` is: an output of another identity is another output.
        solver, steps: None where there is no sampler.
        detail: what else the sampler has that is not its solver's usual, in words.
        evaluations: how often the network sees the whole image.
        own: whether the model itself would choose this sampler.
        labelled: whether `run` is told the images' labels.
    """

    name: str
    scale: int
    run: Run | None
    identity: Mapping[str, Any]
    solver: str | None = None
    steps: int | None = None
    detail: str = ""
    evaluations: int = 0
    own: bool = False
    labelled: bool = False

    @property
    def folder(self) -> str:
        """Where its outputs are, below the outputs of all."""
        if not self.solver:
            return f"{self.name}/{self.scale}x"
        suffix = f"-{sha256_hex(self.identity['sampling'])[:8]}" if self.detail else ""
        return f"{self.name}/{self.solver}-{self.steps}{suffix}"

    @property
    def title(self) -> str:
        """Its name in an image grid."""
        return f"{self.name} {self.solver} {self.steps} steps" if self.solver else self.name

    def samples(self, asked: int) -> int:
        """How many outputs of an image it makes: one where nothing is drawn."""
        return asked if self.solver else 1


def original(scale: int) -> Method:
    """The originals themselves."""
    return Method("original", scale, None, {"original": scale})


def bicubic(scale: int) -> Method:
    """The baseline."""

    def run(low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        return scoring.interpolated(low_res, scale)

    return Method("bicubic", scale, run, {"bicubic": scale})


def sampled(
    model: Model,
    label: str,
    *,
    solvers: Sequence[str] = (),
    steps: Sequence[int] = (),
    unsearched: bool = False,
    labelled: bool = False,
) -> list[Method]:
    """One method for each solver and number of steps; the model's own where none are given.

    Args:
        unsearched: where the model's own sampler comes of a search, the same solver and steps without it as well.
        labelled: the images have labels, which are given to a model that was trained with classes.

    Raises:
        UserError: there is no such solver or number of steps.
    """
    if model.network.regression:  # one pass, whatever is asked of the others
        one = by_sampling(model, label, Sampling(model.sampling.solver, 1), labelled=labelled)
        return [dataclasses.replace(one, solver=None, steps=None, evaluations=1, own=True)]
    weights = fingerprint(model)
    found = []
    for solver in solvers or [model.sampling.solver]:
        for count in steps or [model.sampling.steps]:
            asked = model.sampling.override(solver=solver, steps=count)
            usual = Sampling(solver, count, guidance=asked.guidance, augment=asked.augment)
            choices = [usual, asked] if unsearched and usual != asked else [asked]
            found += [
                by_sampling(model, label, choice, weights=weights, labelled=labelled) for choice in choices
            ]
    return found


def by_sampling(
    model: Model, label: str, sampling: Sampling, *, weights: str | None = None, labelled: bool = False
) -> Method:
    """A model by one sampler.

    Args:
        weights: `fingerprint` of the model, where many methods share it.
        labelled: as for `sampled`.

    Raises:
        UserError: this model cannot be sampled so.
    """
    try:
        sampling.grid(model.schedule)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error

    conditional = bool(labelled and model.network.num_classes)

    def run(low_res: np.ndarray, keys: Key, labels: np.ndarray) -> np.ndarray:
        given = labels if conditional else None
        try:
            return np.asarray(model.upscale(low_res, keys, labels=given, sampling=sampling))
        except FloatingPointError as error:  # a figure of a broken output would be no figure
            raise UserError(f"{error} ({sampling.solver}, {sampling.steps} steps)") from error

    values = dataclasses.asdict(sampling)
    usual = dataclasses.asdict(Sampling(sampling.solver, sampling.steps))
    return Method(
        label,
        model.scale,
        run,
        {
            "weights": weights or fingerprint(model),
            "setup": sampling_file.config_fingerprint(model.config),
            "sampling": values,
        },
        solver=sampling.solver,
        steps=sampling.steps,
        detail=", ".join(_words(name, value) for name, value in values.items() if value != usual[name]),
        evaluations=sampling.nfe,
        own=sampling == model.sampling,
        labelled=conditional,
    )


def _words(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def fingerprint(model: Model) -> str:
    """SHA-256 of a model's weights."""
    return sampling_file.params_fingerprint(model.params)


def labels(names: Sequence[str | Path]) -> list[str]:
    """A short name for each model path or name, for tables and folders: the last part, made unique."""
    taken = {"bicubic", "original"}
    return [unique_file_name(Path(name).resolve().name.removesuffix(".safetensors"), taken) for name in names]
