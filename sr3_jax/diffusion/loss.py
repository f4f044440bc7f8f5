"""The denoising objective (paper Eq. 6), per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from sr3_jax.diffusion.process import Prediction, diffuse, target, to_y0
from sr3_jax.diffusion.schedule import NoiseSchedule, sample_gamma
from sr3_jax.diffusion.space import Space, image
from sr3_jax.types import Conditioning, Denoiser, Image, Key, NoiseLevel

LossNorm = Literal["l1", "l2"]
Weighting = Callable[[NoiseLevel, Prediction], jax.Array]
PerceptualLoss = Callable[[Key, Image, Image], jax.Array]  # (key, estimate of y0, y0) -> [B]


def min_snr(clamp: float = 5.0) -> Weighting:
    """Min-SNR weighting (Hang et al. 2023): keeps low noise levels from dominating the gradient.

    With S = gamma / (1 - gamma), the weight is min(S, clamp) for y0, divided by S for eps and by S + 1 for v. With
    norm 'l2' the three are the same loss.
    """

    def weight(gamma: NoiseLevel, prediction: Prediction) -> jax.Array:
        snr = gamma / (1.0 - gamma)
        scale = {"y0": jnp.ones_like(snr), "eps": snr, "v": snr + 1.0}[prediction]
        return jnp.minimum(snr, clamp) / scale

    return weight


def sample_noise(key: Key, schedule: NoiseSchedule, shape: tuple[int, ...]) -> tuple[NoiseLevel, jax.Array]:
    """What `denoising_loss` samples with this key for images of a shape: gamma [B], and eps [B,H,W,C]."""
    gamma_key, eps_key = jax.random.split(key)
    return sample_gamma(gamma_key, schedule, shape[0]), jax.random.normal(eps_key, shape)


def denoising_loss(
    denoiser: Denoiser,
    key: Key,
    y0: Image,
    cond: Conditioning,
    *,
    schedule: NoiseSchedule,
    prediction: Prediction = "eps",
    norm: LossNorm = "l1",
    weighting: Weighting | None = None,
    perceptual: PerceptualLoss | None = None,
    space: Space = image(),
    gamma: NoiseLevel | None = None,
    eps: jax.Array | None = None,
) -> jax.Array:
    """|f(x, y_t, gamma) - target|^p with p = 1 or 2, for one gamma and one eps per example (paper Eq. 6).

    Args:
        denoiser: the network, with its dropout key, if any, already bound.
        key: for gamma and eps (`sample_noise`).
        y0: [B,H,W,C] the high-res images, [-1,1].
        cond: the condition, passed through to the network.
        schedule: the training schedule.
        prediction: what the network predicts: 'eps', 'v' or 'y0'.
        norm: 'l1', which gives a better FID in the paper, or 'l2', which gives more diverse samples (Palette).
        weighting: weights by gamma, such as `min_snr()`; None weights all levels equally, as in the paper.
        perceptual: a loss of the estimate of y0 as an image, not clipped, that is added at every noise level.
        space: the diffused variable.
        gamma: [B] noise levels; None to sample them by `sample_gamma`.
        eps: [B,H,W,C] unit noise; None to sample it.

    Returns:
        [B] float32, the mean over pixels and channels.

    Raises:
        ValueError: `norm` is unknown, or the network's output has another shape than y0.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm must be 'l1' or 'l2', got {norm!r}")
    if gamma is None or eps is None:
        new_gamma, new_eps = sample_noise(key, schedule, y0.shape)
        gamma = new_gamma if gamma is None else gamma
        eps = new_eps if eps is None else eps
    z0 = space.encode(y0, cond)
    y_t = diffuse(z0, eps, gamma)
    output = denoiser(y_t, gamma, cond)
    if output.shape != z0.shape:  # [B,H,W,1] would broadcast silently
        raise ValueError(f"the denoiser must predict {z0.shape}, got {output.shape}")
    error = output - target(z0, eps, gamma, prediction)
    error = jnp.abs(error) if norm == "l1" else jnp.square(error)
    loss = jnp.mean(error, axis=tuple(range(1, error.ndim)))  # [B]
    if weighting is not None:
        loss *= weighting(gamma, prediction)
    if perceptual is not None:
        y0_hat = space.decode(to_y0(output, y_t, gamma, prediction), cond)
        loss += perceptual(jax.random.fold_in(key, 2), y0_hat, y0)
    return loss
