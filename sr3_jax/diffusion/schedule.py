"""Noise schedules: how much signal variance gamma_t is left after t of T noising steps, and p(gamma).

Tables are built in float64 and handed out as float32, each from the float64 values: 1 - gamma computed from a
float32 gamma has lost its digits at the clean end. Shape legend: T training steps, N inference steps, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.aliases import Key, NoiseLevel

Spacing = Literal["log_snr", "uniform", "karras"]
# Noisier levels than this hold no signal that a step could win: `linear` ends at -10.03, `cosine` at -21, and a few
# steps spread evenly over its whole range would mostly be spent there.
LEAST_LOG_SNR = -10.1
KARRAS_RHO = 7.0  # Karras et al. 2022, section 3: how strongly the grid leans towards low noise


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
            raise ValueError(
                "gamma must be strictly decreasing and stay above 0; make the betas larger than 0"
            )
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
    """sqrt(gamma) a quarter of a cosine (Nichol and Dhariwal 2021, Eq. 17), betas kept under `beta_max`."""
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1.0 + offset) * np.pi / 2
    squared = np.cos(angle) ** 2
    return from_beta(np.minimum(1.0 - squared[1:] / squared[:-1], beta_max))


def respace(schedule: NoiseSchedule, num_steps: int, spacing: Spacing = "log_snr") -> NoiseSchedule:
    """An inference schedule of N steps from the training schedule's noisiest level to clean.

    y_T stays as noisy as the network knows it; keeping betas instead would leave signal in it. Except for 'uniform',
    the cleanest noisy level is the training schedule's gamma_1 and the noisiest has a log-SNR of at least -10.1.

    Args:
        schedule: the training schedule.
        num_steps: N >= 1; for 'uniform' at most T.
        spacing: 'log_snr' even in log-SNR; 'uniform' every (T/N)-th training step; 'karras' even in
            sigma^(1/7), sigma = sqrt((1-gamma)/gamma) (Karras et al. 2022, Eq. 5).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    total = schedule.num_steps
    if spacing == "uniform":
        if num_steps > total:
            raise ValueError(
                f"uniform spacing has at most the {total} training steps, got num_steps={num_steps}"
            )
        return from_gamma(schedule.gamma64[np.linspace(0, total, num_steps + 1).round().astype(int)])
    first, last = log_snr64(schedule.gamma64[[1, -1]])
    last = max(last, min(LEAST_LOG_SNR, first))
    if num_steps == 1:
        first = last
    if spacing == "log_snr":
        log_snr = np.linspace(first, last, num_steps)
    elif spacing == "karras":
        root = np.linspace(np.exp(-first / 2 / KARRAS_RHO), np.exp(-last / 2 / KARRAS_RHO), num_steps)
        log_snr = -2 * KARRAS_RHO * np.log(root)
    else:
        raise ValueError(f"spacing must be 'log_snr', 'uniform' or 'karras', got {spacing!r}")
    return from_gamma(np.concatenate([[1.0], 1.0 / (1.0 + np.exp(-log_snr))]))


def sample_gamma(key: Key, schedule: NoiseSchedule, batch_size: int) -> NoiseLevel:
    """Draw one gamma an example from the paper's p(gamma) (section 2.4): t ~ U{1..T}, gamma ~ U(gamma_t, gamma_{t-1}).

    Stratified: example i draws from the i-th of B equal slices of t, so that a batch covers all noise levels and
    the loss of a small batch is less noisy; each example's position in the batch has nothing to do with its data.

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
