"""Sampling settings as plain values: solver, number of steps, noise grid, solver options, guidance.

A model has default settings, from `config.sampling` or found by `sr3 search-schedule`; every function and command that
samples can override them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sr3_jax.diffusion.schedule import SPACINGS, NoiseSchedule, Spacing, respace
from sr3_jax.diffusion.solvers import SOLVERS, Solver, make_solver, solver_options
from sr3_jax.errors import UserError

__all__ = ["SOLVERS", "Sampling"]

_RANGES = {"variance": (0, 1), "eta": (0, 1), "augment": (0, 1), "guidance": (0, math.inf)}
_NEUTRAL = {"variance": 0.5, "eta": 0.0}  # options of some solvers: the default, which all solvers accept


@dataclass(frozen=True)
class Sampling:
    """Settings of a sampler; hashable and comparable.

    Attributes:
        solver: 'ancestral', 'ddpm' (the paper's), 'ddim', 'dpmpp_2m', 'heun', or a user's own as 'MODULE:FUNCTION'.
        steps: N, the number of reverse steps.
        spacing: 'log_snr', 'uniform', 'karras' or 'linear', see `diffusion.respace`; None for the solver's own.
        log_snr_min: log-SNR of the noisiest level, where sampling starts; None for the training schedule's.
        log_snr_max: log-SNR of the last noisy level; None for the training schedule's.
        variance: option of the ancestral solver, 0 (posterior variance) to 1 (the paper's beta), see there.
        eta: option of the DDIM solver, 0 (deterministic) to 1.
        guidance: weight of classifier-free guidance; 1 for none.
        augment: strength in [0,1] of the conditioning augmentation.
        back_projection: rounds of adding the upsampled difference between the low-res image and the downsampled output
            (Irani and Peleg 1991), which make the output consistent with its input; 0 for none.

    Raises:
        UserError: a value that no schedule can be sampled with.
    """

    solver: str = "dpmpp_2m"
    steps: int = 25
    spacing: Spacing | None = None
    log_snr_min: float | None = None
    log_snr_max: float | None = None
    variance: float = 0.5
    eta: float = 0.0
    guidance: float = 1.0
    augment: float = 0.0
    back_projection: int = 0

    def __post_init__(self) -> None:
        try:
            options = solver_options(self.solver)
        except ValueError as error:
            raise UserError(str(error)) from None
        if type(self.steps) is not int or self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps!r}")
        if type(self.back_projection) is not int or not 0 <= self.back_projection <= 100:
            raise UserError(
                f"back_projection must be a whole number from 0 to 100, got {self.back_projection!r}"
            )
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise UserError(f"spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not least <= value <= most:
                bounds = f"from {least} to {most}" if math.isfinite(most) else f"at least {least}"
                raise UserError(f"{name} must be {bounds}, got {value!r}")
        for name in ("log_snr_min", "log_snr_max"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise UserError(
                    f"{name} must be a number, or null for the training schedule's, got {value!r}"
                )
        for name, neutral in _NEUTRAL.items():
            if name not in options and getattr(self, name) != neutral:
                raise UserError(f"solver {self.solver} has no option {name}: omit it")

    @property
    def words(self) -> str:
        """The solver and the number of steps, such as 'dpmpp_2m, 10 steps'."""
        return f"{self.solver}, {count_steps(self.steps)}"

    @property
    def nfe(self) -> int:
        """Network function evaluations per image, guidance not counted."""
        return make_solver(self.solver).nfe(self.steps)

    def make_solver(self) -> Solver:
        """The solver with its options."""
        known = solver_options(self.solver)
        return make_solver(self.solver, **{name: getattr(self, name) for name in _NEUTRAL if name in known})

    def grid(self, schedule: NoiseSchedule) -> NoiseSchedule:
        """The inference schedule. UserError if the training schedule has no such grid."""
        spacing = self.spacing or make_solver(self.solver).spacing
        try:
            return respace(
                schedule, self.steps, spacing, log_snr_min=self.log_snr_min, log_snr_max=self.log_snr_max
            )
        except ValueError as error:
            raise UserError(f"steps={self.steps} with spacing={spacing} fails: {error}") from None

    def coefficients(self, schedule: NoiseSchedule) -> Any:
        """[N] NumPy arrays, the solver's coefficients on the grid: an argument of the jitted sampling program."""
        return jax.tree.map(np.asarray, self.make_solver().coefficients(self.grid(schedule)))

    def override(self, *, steps: int | None = None, solver: str | None = None) -> Sampling:
        """These settings with another number of steps or another solver.

        A grid and solver options are valid only for the solver and number of steps that they were found for: if either
        changes, sampling uses the new solver's default grid and options. Other settings do not change.
        """
        steps, solver = self.steps if steps is None else steps, self.solver if solver is None else solver
        if (steps, solver) == (self.steps, self.solver):
            return self
        return Sampling(
            solver,
            steps,
            guidance=self.guidance,
            augment=self.augment,
            back_projection=self.back_projection,
        )


def count_steps(steps: int) -> str:
    """'1 step', '2 steps'."""
    return f"{steps} step{'s' * (steps != 1)}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
