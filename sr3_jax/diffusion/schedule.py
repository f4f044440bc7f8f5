"""Noise schedules: the signal variance gamma_t left after t of T noising steps, and p(gamma).

Tables are built in float64 and returned as float32, each computed from the float64 values: 1 - gamma of a float32
gamma has lost its digits at the clean end. Shape legend: T training steps, N inference steps, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.types import Key, NoiseLevel

Spacing = Literal["log_snr", "uniform", "karras", "linear"]
SPACINGS: tuple[Spacing, ...] = ("log_snr", "uniform", "karras", "linear")
# Noisier levels contain too little signal: `linear` ends at -10.03 but `cosine` at -21, and a few steps spread evenly
# over its whole range would mostly be spent on levels below this.
LEAST_LOG_SNR = -10.1
KARRAS_RHO = 7.0  # Karras et al. 2022, section 3: how strongly the grid leans toward low noise


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A decreasing grid of noise levels from clean (gamma_0 = 1) to noise (gamma_T). Hashes by identity.

    Attributes:
        gamma64: [T+1] float64, gamma64[0] == 1, strictly decreasing, positive: prod_{i<=t} alpha_i (paper 2.1).
    """

    gamma64: np.ndarray

    def __post_init__(self) -> None:
        gamma = self.gamma64
        if gamma.ndim != 1 or gamma.size < 2:
            raise ValueError(f"gamma must be a vector of at least 2 levels, got shape {gamma.shape}")
        if gamma[0] != 1.0:
            raise ValueError(f"gamma must start at 1 (no noise), got {gamma[0]}")
        if not (np.all(np.diff(gamma) < 0) and gamma[-1] > 0):
            raise ValueError("gamma must be strictly decreasing and stay above 0: use betas above 0")
        gamma.flags.writeable = False

    @property
    def num_steps(self) -> int:
        """T (for an inference schedule N): the number of noising steps."""
        return self.gamma64.size - 1

    @property
    def gamma(self) -> np.ndarray:
        """[T+1] float32; strictly decreasing as long as the first beta is above 6e-8, float32's step below 1."""
        return self.gamma64.astype(np.float32)

    @property
    def beta(self) -> np.ndarray:
        """[T] float32, beta[t-1] = 1 - gamma_t / gamma_{t-1} for t = 1..T: the variance that step t adds."""
        return (1.0 - self.gamma64[1:] / self.gamma64[:-1]).astype(np.float32)

    @property
    def log_snr(self) -> np.ndarray:
        """[T+1] float32, ln(gamma / (1 - gamma)); +inf at t = 0."""
        return log_snr64(self.gamma64).astype(np.float32)


def log_snr64(gamma: np.ndarray) -> np.ndarray:
    """ln(gamma / (1 - gamma)) in float64; +inf where gamma is 1."""
    with np.errstate(divide="ignore"):
        return np.log(gamma) - np.log1p(-gamma)


def from_gamma(gamma: np.ndarray) -> NoiseSchedule:
    """A schedule from any strictly decreasing grid of levels [T+1] that starts at 1."""
    return NoiseSchedule(np.array(gamma, np.float64))


def from_beta(beta: np.ndarray) -> NoiseSchedule:
    """A schedule from the step variances beta_1..beta_T in (0,1), [T]."""
    return NoiseSchedule(np.concatenate([[1.0], np.cumprod(1.0 - np.asarray(beta, np.float64))]))


def linear(num_steps: int = 2000, beta_start: float = 1e-6, beta_end: float = 1e-2) -> NoiseSchedule:
    """beta linear in t. The paper leaves the training schedule open; these end points are Palette's (same group)."""
    return from_beta(np.linspace(beta_start, beta_end, num_steps))


def quadratic(num_steps: int = 2000, beta_start: float = 1e-6, beta_end: float = 1e-2) -> NoiseSchedule:
    """sqrt(beta) linear in t: more of the steps at low noise than `linear`."""
    return from_beta(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def cosine(num_steps: int = 2000, offset: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
    """sqrt(gamma) is a quarter of a cosine (Nichol and Dhariwal 2021, Eq. 17), betas limited to `beta_max`."""
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1.0 + offset) * np.pi / 2
    squared = np.cos(angle) ** 2
    return from_beta(np.minimum(1.0 - squared[1:] / squared[:-1], beta_max))


def respace(
    schedule: NoiseSchedule,
    num_steps: int,
    spacing: Spacing = "log_snr",
    *,
    log_snr_min: float | None = None,
    log_snr_max: float | None = None,
) -> NoiseSchedule:
    """An inference schedule of N steps, from the noisiest level of the training schedule to clean.

    y_T is as noisy as in training; with fewer steps of the same betas, signal would be left in it. Except for
    'uniform', gamma_1 is the training schedule's and the log-SNR of gamma_N is at least -10.1.

    Args:
        schedule: the training schedule.
        num_steps: N >= 1; for 'uniform' at most T.
        spacing: 'log_snr' even in log-SNR; 'uniform' every (T/N)-th training step; 'karras' even in
            sigma^(1/7), sigma = sqrt((1-gamma)/gamma) (Karras et al. 2022, Eq. 5); 'linear' betas linear in the step,
            as in Palette, the last one chosen to reach gamma_N.
        log_snr_min: log-SNR of gamma_N, where sampling starts, within the range of the training schedule; None for its
            end.
        log_snr_max: log-SNR of gamma_1, the last level before the clean image; not used with one step.

    Raises:
        ValueError: unknown spacing, or the training schedule has no such grid.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    known = log_snr64(schedule.gamma64[1:])
    first, last = known[[0, -1]]
    for name, level in (("log_snr_min", log_snr_min), ("log_snr_max", log_snr_max)):
        if level is not None and not last - 1e-6 <= level <= first + 1e-6:
            raise ValueError(
                f"{name} must be within the training schedule's log-SNR, {last:.3f} to {first:.3f}, got {level}"
            )
    if spacing == "uniform":
        return _strided(schedule, num_steps, log_snr_min, log_snr_max)
    last = max(last, min(LEAST_LOG_SNR, first)) if log_snr_min is None else log_snr_min
    first = first if log_snr_max is None else log_snr_max
    if num_steps == 1:
        first = last
    elif not last < first:
        raise ValueError(f"log_snr_min must be below log_snr_max={first:.3f}, got {last:.3f}")
    if spacing == "linear":
        return _linear_between(num_steps, first, last)
    if spacing == "log_snr":
        log_snr = np.linspace(first, last, num_steps)
    else:
        root = np.linspace(np.exp(-first / 2 / KARRAS_RHO), np.exp(-last / 2 / KARRAS_RHO), num_steps)
        log_snr = -2 * KARRAS_RHO * np.log(root)
    return from_gamma(np.concatenate([[1.0], _gamma_of(log_snr)]))


def _gamma_of(log_snr: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-log_snr))


def _strided(
    schedule: NoiseSchedule, num_steps: int, log_snr_min: float | None, log_snr_max: float | None
) -> NoiseSchedule:
    """Even in the training step t; between two training steps, even in log-SNR."""
    total = schedule.num_steps
    if num_steps > total:
        raise ValueError(
            f"uniform spacing allows at most the {total} training steps, got num_steps={num_steps}"
        )
    if log_snr_min is None and log_snr_max is None:
        return from_gamma(schedule.gamma64[np.linspace(0, total, num_steps + 1).round().astype(int)])
    known, t = log_snr64(schedule.gamma64[1:]), np.arange(1, total + 1)
    end = total if log_snr_min is None else np.interp(-log_snr_min, -known, t)
    start = end / num_steps if log_snr_max is None or num_steps == 1 else np.interp(-log_snr_max, -known, t)
    log_snr = np.interp(np.linspace(start, end, num_steps), t, known)
    return from_gamma(np.concatenate([[1.0], _gamma_of(log_snr)]))


def _linear_between(num_steps: int, first: float, last: float) -> NoiseSchedule:
    """Betas linear in the step, with these log-SNRs at gamma_1 and gamma_N. gamma_N falls with beta_N: bisection."""
    gamma_1, gamma_n = _gamma_of(np.array([first, last]))
    if num_steps == 1:
        return from_gamma(np.array([1.0, gamma_n]))
    if np.sum(np.log1p(-np.linspace(1 - gamma_1, 0.0, num_steps))) <= np.log(gamma_n):
        raise ValueError(
            f"{num_steps} linear betas from {1 - gamma_1:.3g} end noisier than log_snr_min={last:.3f}: "
            "lower log_snr_min or raise log_snr_max"
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        reached = np.sum(np.log1p(-np.linspace(1 - gamma_1, middle, num_steps)))
        low, high = (middle, high) if reached > np.log(gamma_n) else (low, middle)
    beta = np.linspace(1 - gamma_1, high, num_steps)
    # The last level is the end point itself, not what rounding left of it.
    gamma = np.concatenate([np.cumprod(1 - beta[:-1]), [gamma_n]])
    return from_gamma(np.concatenate([[1.0], gamma]))


def sample_gamma(key: Key, schedule: NoiseSchedule, batch_size: int) -> NoiseLevel:
    """Sample one gamma per example from p(gamma) (paper, section 2.4): t ~ U{1..T}, gamma ~ U(gamma_t, gamma_{t-1}).

    Stratified: example i samples from the i-th of B equal slices of t, so that a batch covers all noise levels and the
    loss of a small batch is less noisy. An example's position in the batch is independent of its data.

    Returns:
        [B] float32.
    """
    jitter = jax.random.uniform(key, (batch_size,))
    position = (jnp.arange(batch_size) + jitter) * (schedule.num_steps / batch_size)  # in [0, T)
    # The sum can round up to T itself; t would then be one past the table.
    t = jnp.minimum(position.astype(jnp.int32), schedule.num_steps - 1)
    # Piecewise uniform: the position within its step is itself uniform, and independent of the step.
    gamma = jnp.asarray(schedule.gamma)
    return gamma[t] + (position - t) * (gamma[t + 1] - gamma[t])
