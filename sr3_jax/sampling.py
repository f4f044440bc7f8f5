"""How a trained model is sampled, as plain values: solver, steps, grid and variances; and the file that keeps it.

`sr3 search-schedule` finds a `Sampling` and stores it beside the model: `sampling.json` in a workdir,
NAME.sampling.json next to NAME.safetensors. `model.load` takes it up as the model's default.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax.diffusion import solvers
from sr3_jax.diffusion.schedule import SPACINGS, NoiseSchedule, respace
from sr3_jax.diffusion.solvers import Solver
from sr3_jax.errors import UserError
from sr3_jax.files import sha256_hex, write_text
from sr3_jax.types import Params

_log = logging.getLogger("sr3_jax")
SOLVERS = ("ancestral", "ddim", "dpmpp_2m", "heun")
FORMAT = "sr3_jax.sampling.1"
FILE = "sampling.json"


@functools.cache
def solver_named(name: str) -> Solver:
    """The solver of that name at its default settings; the same value each time, so that jit compiles once."""
    if name not in SOLVERS:
        raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return getattr(solvers, name)()


@functools.cache
def inference_grid(schedule: NoiseSchedule, steps: int, solver: str) -> NoiseSchedule:
    """The grid of a sampler with that many steps, of the solver's own spacing."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    return respace(schedule, steps, solver_named(solver).spacing)


def nfe(solver: str, steps: int) -> int:
    """How often a sampler calls the network; Heun's method twice a step, but for the last."""
    return 2 * steps - 1 if solver == "heun" else steps


@dataclass(frozen=True)
class Sampling:
    """A sampler's settings, hashable and comparable; UserError for values that cannot work on any schedule.

    Attributes:
        solver: 'ancestral', 'ddim', 'dpmpp_2m' or 'heun'.
        steps: N.
        spacing: 'log_snr', 'uniform', 'karras' or 'linear' as in `diffusion.schedule.respace`; None: the solver's own.
        log_snr_min, log_snr_max: log-SNR where sampling starts, and of the last level before the clean image; None: the
            training schedule's.
        variance: of the ancestral solver, 0 (posterior) to 1 (the paper's beta), in the exponent.
        eta: of the DDIM solver, 0 (no noise) to 1.
        guidance: how far to go from the prediction without the label to the one with it; 1: with it alone.
        augment: strength in [0,1] of the condition's augmentation that the network is told of.
    """

    solver: str = "dpmpp_2m"
    steps: int = 25
    spacing: str | None = None
    log_snr_min: float | None = None
    log_snr_max: float | None = None
    variance: float = 1.0
    eta: float = 0.0
    guidance: float = 1.0
    augment: float = 0.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps!r}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise UserError(f"spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        ranges = {"variance": (0, 1), "eta": (0, 1), "augment": (0, 1), "guidance": (0, math.inf)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not _is_number(value) or not least <= value <= most:
                above = f"be from {least} to {most}" if math.isfinite(most) else f"be at least {least}"
                raise UserError(f"{name} must {above}, got {value!r}")
        for name in ("log_snr_min", "log_snr_max"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise UserError(
                    f"{name} must be a log-SNR, or null for the training schedule's, got {value!r}"
                )
        for name, owner, neutral in (("variance", "ancestral", 1.0), ("eta", "ddim", 0.0)):
            if self.solver != owner and getattr(self, name) != neutral:
                raise UserError(
                    f"{name} is of solver {owner} alone, got solver {self.solver!r}: leave it out"
                )

    @property
    def nfe(self) -> int:
        """How often the network sees the image, guidance aside."""
        return nfe(self.solver, self.steps)

    def grid(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The inference schedule. UserError if there is no such grid in this training schedule."""
        spacing = self.spacing or solver_named(self.solver).spacing
        ends = {"log_snr_min": self.log_snr_min, "log_snr_max": self.log_snr_max}
        try:
            return respace(schedule, self.steps, spacing, **ends)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(
                f"{self.steps} steps of spacing {spacing} do not fit the noise schedule ({error}): choose others"
            ) from None

    def method(self) -> Solver:
        """The solver with its variance."""
        if self.solver == "ancestral":
            return solvers.ancestral(self.variance)
        return solvers.ddim(self.eta) if self.solver == "ddim" else solver_named(self.solver)

    def build(self, schedule: NoiseSchedule) -> tuple[NoiseSchedule, Solver]:
        """The inference schedule and the solver, as `diffusion.sampler.sample` takes them."""
        return self.grid(schedule), self.method()

    def coefficients(self, schedule: NoiseSchedule) -> Any:
        """[N] arrays for `with_coefficients(self.program, ...)`, which is what `build` gives, and compiles once."""
        return solvers.coefficients(self.method(), self.grid(schedule))

    @property
    def program(self) -> Solver:
        """The solver whose steps this sampling takes: one value for all grids and strengths of noise."""
        return _noisy_ddim() if self.solver == "ddim" and self.eta > 0 else solver_named(self.solver)

    def asked(self, *, steps: int | None = None, solver: str | None = None) -> Sampling:
        """The sampling for steps or a solver that are asked for by name.

        What names nothing new is this sampling itself. Any other number of steps or solver is sampled on that
        solver's own grid, between the training schedule's ends, with its usual variance: a grid is found together
        with its solver and steps, and is worth nothing for others. Guidance and augment are of the condition and stay.
        """
        steps, solver = (self.steps if steps is None else steps), (self.solver if solver is None else solver)
        if (steps, solver) == (self.steps, self.solver):
            return self
        return Sampling(solver, steps, guidance=self.guidance, augment=self.augment)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


@functools.cache
def _noisy_ddim() -> Solver:
    return solvers.ddim(1.0)


@dataclass(frozen=True)
class Stored:
    """A sampling with what it was found for.

    Attributes:
        weights: `fingerprint` of the weights that it was searched with.
        setup: `config_fingerprint` their config.
        model: their name, in words.
        found: how: metric, data, scores; plain values for people.
    """

    sampling: Sampling
    weights: str
    setup: str
    model: str
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def fingerprint(params: Params) -> str:
    """SHA-256 of weights: names, shapes, dtypes and bytes, whatever file they came from."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sha256_hex({jax.tree_util.keystr(path): sha256_hex(np.asarray(leaf)) for path, leaf in leaves})


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of what in a config decides about the network and its noise: equal for all steps of a run."""
    return sha256_hex(
        {name: config.get(name) for name in ("model", "diffusion")} | {"scale": config["data"]["scale"]}
    )


def sampling_path(model: Path) -> Path:
    """Where the sampling of a model is kept, given its workdir or its .safetensors file."""
    if os.path.isdir(model):
        return model / FILE
    return model.with_name(f"{model.name.removesuffix('.safetensors')}.{FILE}")


def store(path: Path, stored: Stored) -> None:
    """Write a sampling file. UserError if it cannot be written."""
    values = {"format": FORMAT, **dataclasses.asdict(stored)}
    try:
        write_text(path, json.dumps(values, indent=2) + "\n")
    except UserError as error:
        raise UserError(
            f"{path} cannot be written: bring the model to a folder of yours with sr3 export"
        ) from error


def read_stored(path: Path) -> Stored:
    """What `store` wrote. UserError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise UserError("it is of another version")
        return Stored(sampling=Sampling(**values.pop("sampling")), **values)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except KeyError as error:
        reason = f"it has no {error}"
    except (UserError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(
        f"{path} holds no sampling of ours ({reason}): delete it, or make it anew with sr3 search-schedule"
    )


def carry_over(source: Path, target: Path, sampling: Sampling, *, params: Params, name: str) -> bool:
    """Store for the exported weights `params` at `target` what is used of the file beside `source`; whether there is.

    What the source would be sampled with, its export is sampled with, though the precision of the weights may differ.
    """
    file = sampling_path(source)
    stored = read_stored(file) if os.path.isfile(file) else None
    if stored is None or stored.sampling != sampling:
        return False
    found = {**stored.found, "searched_with": stored.model}
    store(
        sampling_path(target),
        dataclasses.replace(stored, weights=fingerprint(params), model=name, found=found),
    )
    return True


def find_stored(
    path: Path, *, own: Sampling, params: Params, config: Mapping[str, Any], name: str
) -> Sampling:
    """The sampling that is stored beside a model, or the model's `own` if there is none for it.

    A file for other weights is not used, and a warning says so. In a workdir the weights move on
    while the file stays: there it is used for later steps of the run as well, with a word about it, since the levels of
    noise that suit a network change little as it gets better. Of another network or noise schedule it is never used.

    Raises:
        UserError: the file is damaged.
    """
    file = sampling_path(path)
    if not os.path.isfile(file):
        return own
    stored = read_stored(file)
    if stored.weights == fingerprint(params):
        return stored.sampling
    if os.path.isdir(path) and stored.setup == config_fingerprint(config):
        _log.warning(
            "%s was searched with %s; it is used for %s too: run sr3 search-schedule again when training is done",
            file, stored.model, name,
        )  # fmt: skip
        return stored.sampling
    _log.warning(
        "%s was searched with other weights (%s) than those of %s and is not used: run sr3 search-schedule again",
        file, stored.model, name,
    )  # fmt: skip
    return own
