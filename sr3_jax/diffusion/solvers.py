"""Reverse-time solvers, which step from one noise level to the next lower one.

A solver is a set of pure functions that one `lax.scan` calls (`sampler.sample`). Everything that depends only on the
grid of noise levels is computed in float64 before the scan (`Solver.coefficients`), and the compiled loop reads it row
by row. In the notation of the grid: a = sqrt(gamma), s = sqrt(1 - gamma), l = ln(a / s), half
the log-SNR. Shape legend: N inference steps; y and y0 are [B,H,W,C].
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.diffusion.schedule import NoiseSchedule, Spacing, log_snr64

Denoise = Callable[[jax.Array, jax.Array], Any]
"""(y [B,H,W,C], gamma scalar) -> the clipped estimate of y0 [B,H,W,C]; a pair of it and v if `SolverStep.learned`."""


class Carry(NamedTuple):
    """State of the reverse loop: the current y, and the solver's memory of earlier steps."""

    y: jax.Array
    memory: Any


class SolverStep(NamedTuple):
    """The part of a solver that is compiled. Module-level functions, so that equal steps share one compilation.

    Attributes:
        init: y_T -> memory.
        step: (denoise, carry, z, row) -> carry; z is fresh unit noise [B,H,W,C], None for a deterministic solver; row
            is one row of the coefficients.
        stochastic: whether `step` reads z.
        learned: whether `step` needs the network's own variance: `denoise` then returns (y0, v), v [B,H,W,C] as in
            `ancestral_learned`.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Denoise, Carry, jax.Array | None, Any], Carry]
    stochastic: bool
    learned: bool = False


@dataclass(frozen=True)
class Solver:
    """A sampling method.

    Attributes:
        coefficients: inference schedule -> a pytree of [N] arrays, one row per step, noisiest level first. Options
            such as eta belong here only: the compiled step must depend on them through its row.
        compiled: the step that reads these rows.
        spacing: the grid spacing that works best for few steps.
        nfe: N -> network function evaluations.
    """

    coefficients: Callable[[NoiseSchedule], Any]
    compiled: SolverStep
    spacing: Spacing = "log_snr"
    nfe: Callable[[int], int] = lambda num_steps: num_steps


def _no_memory(y: jax.Array) -> tuple[()]:
    return ()


class LinearRow(NamedTuple):
    """y_s = from_y0 * y0_hat + from_y * y_t + noise * z."""

    gamma: jax.Array
    from_y0: jax.Array
    from_y: jax.Array
    noise: jax.Array


def _levels(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """gamma_t and gamma_s of the N steps in sampling order, float64; the last gamma_s is 1."""
    descending = schedule.gamma64[::-1]
    return descending[:-1], descending[1:]


def _rows(row_type: type, *columns: np.ndarray) -> Any:
    return row_type(*(jnp.asarray(column, jnp.float32) for column in columns))


def _linear_step(denoise: Denoise, carry: Carry, z: jax.Array | None, row: LinearRow) -> Carry:
    y0_hat = denoise(carry.y, row.gamma)
    y = row.from_y0 * y0_hat + row.from_y * carry.y
    return Carry(y if z is None else y + row.noise * z, carry.memory)


def ancestral(variance: float = 0.5) -> Solver:
    """The ancestral sampler on any grid; the last step adds no noise.

    Args:
        variance: v in [0,1]; sigma^2 = posterior^(1-v) * beta^v interpolates between the variance of the posterior
            given y0 (v=0), which is too small with few steps, and the paper's beta = 1 - alpha_t (v=1), which is too
            large. On a log-SNR grid, v=0.5 gives data of small variance within 2 % of its standard deviation from 25
            steps on, where v=1 adds 30 % of visible noise.
    """
    if not 0.0 <= variance <= 1.0:
        raise ValueError(f"variance must be in [0, 1], got {variance}")

    def coefficients(schedule: NoiseSchedule) -> LinearRow:
        gamma_t, gamma_s = _levels(schedule)
        alpha = gamma_t / gamma_s
        from_y0 = np.sqrt(gamma_s) * (1 - alpha) / (1 - gamma_t)
        from_y = np.sqrt(alpha) * (1 - gamma_s) / (1 - gamma_t)
        beta = 1 - alpha
        ratio = (1 - gamma_s) / (1 - gamma_t)  # posterior variance / beta; 0 at the last step
        noise = np.where(gamma_s == 1.0, 0.0, np.sqrt(beta) * ratio ** ((1 - variance) / 2))
        return _rows(LinearRow, gamma_t, from_y0, from_y, noise)

    return Solver(coefficients, SolverStep(_no_memory, _linear_step, stochastic=True))


def ddpm() -> Solver:
    """The paper's sampler (Algorithm 2): ancestral with variance 1 - alpha_t. It needs hundreds of steps."""
    return ancestral(variance=1.0)


class LearnedRow(NamedTuple):
    """y_s = from_y0 * y0_hat + from_y * y_t + noise * exp(narrowing * (1 - v)) * z."""

    gamma: jax.Array
    from_y0: jax.Array
    from_y: jax.Array
    noise: jax.Array
    narrowing: jax.Array


def _learned_step(denoise: Denoise, carry: Carry, z: jax.Array | None, row: LearnedRow) -> Carry:
    assert z is not None
    y0_hat, v = denoise(carry.y, row.gamma)
    noise = row.noise * jnp.exp(row.narrowing * (1.0 - v)) * z
    return Carry(row.from_y0 * y0_hat + row.from_y * carry.y + noise, carry.memory)


def ancestral_learned() -> Solver:
    """`ancestral` with a variance v of each pixel that the network predicts (Nichol and Dhariwal 2021, Eq. 15).

    For networks with 2C output channels, whose second half is 2v - 1. v is not clipped, as in training.
    """

    def coefficients(schedule: NoiseSchedule) -> LearnedRow:
        gamma_t, gamma_s = _levels(schedule)
        ratio = (1 - gamma_s) / (1 - gamma_t)  # posterior variance / beta; the last step adds no noise
        narrowing = np.log(np.where(gamma_s == 1.0, 1.0, ratio)) / 2
        row: LinearRow = ancestral(1.0).coefficients(schedule)
        return LearnedRow(*row, narrowing=jnp.asarray(narrowing, jnp.float32))

    return Solver(
        coefficients, SolverStep(_no_memory, _learned_step, stochastic=True, learned=True), spacing="uniform"
    )


def ddim(eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2020, Eq. 12): eta=0 deterministic, eta=1 the ancestral sampler with posterior variance."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be in [0, 1], got {eta}")

    def coefficients(schedule: NoiseSchedule) -> LinearRow:
        gamma_t, gamma_s = _levels(schedule)
        noise = eta * np.sqrt((1 - gamma_t / gamma_s) * (1 - gamma_s) / (1 - gamma_t))
        # y_s = a_s y0 + sqrt(1 - gamma_s - noise^2) eps, with eps from y_t and the clipped y0.
        from_y = np.sqrt(np.maximum(1 - gamma_s - noise**2, 0.0) / (1 - gamma_t))
        from_y0 = np.sqrt(gamma_s) - from_y * np.sqrt(gamma_t)
        return _rows(LinearRow, gamma_t, from_y0, from_y, noise)

    return Solver(coefficients, SolverStep(_no_memory, _linear_step, stochastic=eta > 0))


class MultistepRow(NamedTuple):
    """y_s = from_y0 * (y0_hat + extrapolate * (y0_hat - previous)) + from_y * y_t."""

    gamma: jax.Array
    from_y0: jax.Array
    from_y: jax.Array
    extrapolate: jax.Array


def _multistep_step(denoise: Denoise, carry: Carry, z: jax.Array | None, row: MultistepRow) -> Carry:
    y0_hat = denoise(carry.y, row.gamma)
    slope = y0_hat - carry.memory
    y = row.from_y0 * (y0_hat + row.extrapolate * slope) + row.from_y * carry.y
    return Carry(y, y0_hat)


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order, deterministic, one network evaluation per step."""

    def coefficients(schedule: NoiseSchedule) -> MultistepRow:
        gamma_t, gamma_s = _levels(schedule)
        half_t, half_s = log_snr64(gamma_t) / 2, log_snr64(gamma_s) / 2  # the last half_s is +inf
        width = half_s - half_t
        from_y = np.sqrt((1 - gamma_s) / (1 - gamma_t))  # 0 at the last step, which returns y0_hat
        from_y0 = -np.sqrt(gamma_s) * np.expm1(-width)
        # The first step has no previous estimate, and the last one is infinitely wide: both are first order.
        extrapolate = np.zeros_like(width)
        extrapolate[1:-1] = width[1:-1] / (2 * width[:-2])
        return _rows(MultistepRow, gamma_t, from_y0, from_y, extrapolate)

    return Solver(coefficients, SolverStep(jnp.zeros_like, _multistep_step, stochastic=False))


HEUN_WIDEST = 8.0
"""The largest ratio of noise levels sigma_t / sigma_s that Heun's correction is used for."""


class HeunRow(NamedTuple):
    """Coefficients of y = a y0 + s eps at both ends of a step, and the weight of the change of eps over it."""

    gamma_t: jax.Array
    gamma_s: jax.Array
    a_t: jax.Array
    s_t: jax.Array
    a_s: jax.Array
    s_s: jax.Array
    half: jax.Array


def _heun_step(denoise: Denoise, carry: Carry, z: jax.Array | None, row: HeunRow) -> Carry:
    y0_hat = denoise(carry.y, row.gamma_t)
    eps = (carry.y - row.a_t * y0_hat) / row.s_t
    euler = row.a_s * y0_hat + row.s_s * eps

    def correct(euler: jax.Array) -> jax.Array:
        eps_s = (euler - row.a_s * denoise(euler, row.gamma_s)) / row.s_s
        return euler + row.half * (eps_s - eps)

    return Carry(jax.lax.cond(row.half != 0, correct, lambda y: y, euler), carry.memory)


def heun() -> Solver:
    """Heun's method in x = y / sqrt(gamma) (Karras et al. 2022, Algorithm 1): at most 2N - 1 NFE.

    A step that divides sigma by more than `HEUN_WIDEST` is an Euler (DDIM) step of one NFE. The correction assumes that
    eps changes linearly over the step: over wider ones it throws y far off, and with fewer than eight steps all are
    wide. The last step, to sigma = 0, is an Euler step too.

    It works best on the grid of `respace(..., 'karras')`. It is computed as an Euler (DDIM) step plus a correction for
    the change of eps over it: with sigma = s / a around 150, where sampling starts, x itself would lose precision in
    float32.
    """

    def coefficients(schedule: NoiseSchedule) -> HeunRow:
        gamma_t, gamma_s = _levels(schedule)
        a_t, s_t, a_s, s_s = (np.sqrt(x) for x in (gamma_t, 1 - gamma_t, gamma_s, 1 - gamma_s))
        half = a_s * (s_s / a_s - s_t / a_t) / 2
        half = np.where(s_t / a_t <= HEUN_WIDEST * s_s / a_s, half, 0.0)
        return _rows(HeunRow, gamma_t, gamma_s, a_t, s_t, a_s, s_s, half)

    return Solver(
        coefficients,
        SolverStep(_no_memory, _heun_step, stochastic=False),
        spacing="karras",
        nfe=lambda num_steps: 2 * num_steps - 1,
    )


SOLVERS: Mapping[str, Callable[..., Solver]] = {
    "ancestral": ancestral,
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "heun": heun,
    "ancestral_learned": ancestral_learned,
}
"""Solvers by name: the one registry that the command line, configs and the schedule search read."""


def make_solver(name: str, **options: float) -> Solver:
    """Make a solver by its name, or by a user's own function as 'MODULE:FUNCTION'.

    Raises:
        ValueError: no such solver, an option that it does not have or a value out of its range; a user's function
            that does not return a `Solver`.
    """
    factory = _factory(name)
    known = inspect.signature(factory).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"solver {name} has no option {option!r}; it has: {', '.join(known) or 'none'}")
    solver = factory(**options)
    if not isinstance(solver, Solver):
        raise ValueError(f"solver {name} must return a sr3_jax.diffusion.Solver, got {type(solver).__name__}")
    return solver


def solver_options(name: str) -> dict[str, float]:
    """The options of a solver with their defaults. Raises ValueError if the solver does not exist."""
    return {option: one.default for option, one in inspect.signature(_factory(name)).parameters.items()}


def _factory(name: str) -> Callable[..., Solver]:
    if name in SOLVERS:
        return SOLVERS[name]
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)} or MODULE:FUNCTION, got {name!r}")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"solver {name!r} cannot be imported ({error}); check the module path") from error
