"""The forward process, its posterior, and the conversions between what a network predicts (eps, v, y0) and y0.

Shape legend: B batch, H height, W width, C channels; y is [B,H,W,C] in the diffused space; gamma is [B] or a scalar.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from sr3_jax.types import NoiseLevel

Prediction = Literal["eps", "v", "y0"]
PREDICTIONS: tuple[Prediction, ...] = ("eps", "v", "y0")


def expand(level: NoiseLevel, y: jax.Array) -> jax.Array:
    """A noise level, [B] or scalar, with trailing axes added so that it broadcasts against y [B,H,W,C]."""
    level = jnp.asarray(level)
    return level.reshape(level.shape + (1,) * (y.ndim - level.ndim))


def diffuse(y0: jax.Array, eps: jax.Array, gamma: NoiseLevel) -> jax.Array:
    """y_t = sqrt(gamma) y0 + sqrt(1 - gamma) eps (paper Eq. 3), [B,H,W,C]."""
    gamma = expand(gamma, y0)
    return jnp.sqrt(gamma) * y0 + jnp.sqrt(1.0 - gamma) * eps


def target(y0: jax.Array, eps: jax.Array, gamma: NoiseLevel, prediction: Prediction) -> jax.Array:
    """The training target: eps (the paper), y0, or v = sqrt(gamma) eps - sqrt(1 - gamma) y0 (Salimans and Ho 2022)."""
    if prediction == "eps":
        return eps
    if prediction == "y0":
        return y0
    if prediction == "v":
        gamma = expand(gamma, y0)
        return jnp.sqrt(gamma) * eps - jnp.sqrt(1.0 - gamma) * y0
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def to_y0(output: jax.Array, y_t: jax.Array, gamma: NoiseLevel, prediction: Prediction) -> jax.Array:
    """The estimate of y0 from the network's output at y_t, not clipped; the inverse of `target`.

    From eps it divides by sqrt(gamma): at low gamma small errors of the network become large ones in y0.
    """
    gamma = expand(gamma, y_t)
    if prediction == "eps":
        return (y_t - jnp.sqrt(1.0 - gamma) * output) / jnp.sqrt(gamma)
    if prediction == "y0":
        return output
    if prediction == "v":
        return jnp.sqrt(gamma) * y_t - jnp.sqrt(1.0 - gamma) * output
    raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")


def to_eps(y0: jax.Array, y_t: jax.Array, gamma: NoiseLevel) -> jax.Array:
    """The noise eps that takes y0 to y_t; gamma must be below 1."""
    gamma = expand(gamma, y_t)
    return (y_t - jnp.sqrt(gamma) * y0) / jnp.sqrt(1.0 - gamma)


def posterior(
    y0: jax.Array, y_t: jax.Array, gamma_t: NoiseLevel, gamma_s: NoiseLevel
) -> tuple[jax.Array, jax.Array]:
    """q(y_s | y0, y_t) for any cleaner level s < t (paper Eq. 4, with alpha_t = gamma_t / gamma_s).

    Returns:
        mean [B,H,W,C], and variance, [B,1,1,1] (or with all axes of size 1 for scalar gammas).
    """
    gamma_t, gamma_s = expand(gamma_t, y0), expand(gamma_s, y0)
    alpha = gamma_t / gamma_s
    mean = (jnp.sqrt(gamma_s) * (1.0 - alpha) * y0 + jnp.sqrt(alpha) * (1.0 - gamma_s) * y_t) / (
        1.0 - gamma_t
    )
    return mean, (1.0 - gamma_s) * (1.0 - alpha) / (1.0 - gamma_t)
