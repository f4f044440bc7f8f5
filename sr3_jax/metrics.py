"""How near an output is to its original (PSNR, SSIM) and to its low-res input (consistency, mean colour).

Shape legend: B batch, H height, W width, C channels. Every function is pure jax, takes uint8 images
[B,H,W,C] (quantise first, as an image file does) and returns float32 [B], one figure per example. Whoever
averages over a set does it in the metric's own unit: PSNR in dB. Wrong dtypes and shapes raise ValueError.

Two protocols, 1-2 dB apart, never to be mixed in a table:
  psnr, ssim             RGB, levels 0..255, no border crop (SR3 and most diffusion papers)
  psnr_luma, ssim_luma   Y of BT.601 alone, borders cropped (the classic papers' figures on Set5 and Set14)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

PEAK = 255.0
WINDOW = 11  # SSIM's Gaussian, side in pixels
SIGMA = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2
# Studio-range BT.601 luma: 219/255 of full range over a footroom of 16, as Matlab's rgb2ycbcr.
LUMA = (219 / 255 * 0.299, 219 / 255 * 0.587, 219 / 255 * 0.114)
LUMA_OFFSET = 16.0


@jax.jit
def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB over pixels and channels, peak 255; +inf for identical images."""
    a, b = _levels(a, b)
    return _decibels(jnp.square(a - b))


@jax.jit
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004), at most 1: mean over channels and over whole 11x11 windows.

    Gaussian window of sigma 1.5, K1 0.01, K2 0.03, population covariance: what scikit-image computes with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255`. ValueError if a side is
    under 11 pixels.
    """
    return _ssim(*_levels(a, b))


@partial(jax.jit, static_argnames="crop")
def psnr_luma(a: jax.Array, b: jax.Array, *, crop: int) -> jax.Array:
    """PSNR in dB of the Y channel, peak 255, `crop` border pixels left out (customarily the scale).

    Y is kept as a real number; Matlab's rgb2ycbcr of uint8 rounds it, which moves figures by about 0.01 dB.
    """
    a, b = _levels(a, b)
    return _decibels(jnp.square(_luma(a, crop) - _luma(b, crop)))


@partial(jax.jit, static_argnames="crop")
def ssim_luma(a: jax.Array, b: jax.Array, *, crop: int) -> jax.Array:
    """SSIM, as in `ssim`, of the Y channel with `crop` border pixels left out."""
    a, b = _levels(a, b)
    return _ssim(_luma(a, crop), _luma(b, crop))


@jax.jit
def consistency(output: jax.Array, low_res: jax.Array) -> jax.Array:
    """Mean squared error of the output, shrunk to the low-res size, to low_res; levels in [0,1], unit 1e-5.

    Shrunk by the anti-aliased bicubic that made low_res, clipped to the range that an image holds, not
    rounded: so the original itself scores 0.13, the rounding error of low_res. The paper's SR3 has 2.68 on
    faces 16->128.
    Raises ValueError unless output is a whole multiple of low_res, the same both ways.
    """
    output, low_res = _pair(output, low_res)
    # The kernel of images.resize_bicubic, as a test checks: rooms of one floor do not import each other.
    precision = jax.lax.Precision.HIGHEST
    shrunk = jax.image.resize(output, low_res.shape, "cubic", antialias=True, precision=precision)
    return 1e5 / PEAK**2 * _mean(jnp.square(jnp.clip(shrunk, 0.0, PEAK) - low_res))


@jax.jit
def mean_colour_error(output: jax.Array, low_res: jax.Array) -> jax.Array:
    """Largest shift of a channel's mean from low_res to output, in levels (1/255): the hue shift seen."""
    output, low_res = _pair(output, low_res)
    shift = jnp.mean(output, axis=2).mean(axis=1) - jnp.mean(low_res, axis=2).mean(axis=1)  # [B,C]
    return jnp.max(jnp.abs(shift), axis=1)


def _levels(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two images of one shape as float32 levels."""
    if a.shape != b.shape:
        raise ValueError(f"images to compare must have the same shape, got {a.shape} and {b.shape}")
    return _float(a), _float(b)


def _pair(output: jax.Array, low_res: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An output and the low-res image it came from, as float32 levels."""
    result = _float(output), _float(low_res)
    (batch, height, width, channels), small = output.shape, low_res.shape
    scale = height // max(small[1], 1)
    if scale < 1 or (batch, height, width, channels) != (
        small[0],
        scale * small[1],
        scale * small[2],
        small[3],
    ):
        raise ValueError(f"output {output.shape} must be a whole multiple of low_res {low_res.shape}")
    return result


def _float(image: jax.Array) -> jax.Array:
    if image.ndim != 4 or image.dtype != jnp.uint8:
        raise ValueError(f"metrics take uint8 images [B,H,W,C], got {image.dtype} {image.shape}")
    return image.astype(jnp.float32)


def _mean(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B]. Rows first, lest accuracy hang on how a backend orders a sum over millions."""
    return jnp.mean(jnp.mean(x, axis=(2, 3)), axis=1)


def _decibels(squared_error: jax.Array) -> jax.Array:
    return 10.0 * jnp.log10(PEAK**2 / _mean(squared_error))


def _luma(image: jax.Array, crop: int) -> jax.Array:
    """RGB levels [B,H,W,3] -> Y in [16,235], [B,H-2*crop,W-2*crop,1]."""
    _, height, width, channels = image.shape
    if channels != 3:
        raise ValueError(f"luma needs 3 channels, got {channels}")
    if crop < 0 or min(height, width) <= 2 * crop:
        raise ValueError(f"a border of {crop} leaves nothing of a {height}x{width} image")
    red, green, blue = (image[:, crop : height - crop, crop : width - crop, c : c + 1] for c in range(3))
    return LUMA_OFFSET + LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 levels [B,H,W,C] -> [B]."""
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW}x{WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}")
    # A variance is a difference of squares: around the image's own mean they are small and lose few digits.
    shift_a, shift_b = (jnp.round(jnp.mean(x, axis=(1, 2), keepdims=True)) for x in (a, b))  # [B,1,1,C]
    a, b = a - shift_a, b - shift_b
    mean_a, mean_b, aa, bb, ab = jnp.split(_blur(jnp.concatenate([a, b, a * a, b * b, a * b])), 5)
    var_a, var_b, covariance = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + shift_a, mean_b + shift_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a * mean_a + mean_b * mean_b + C1)
    return _mean(luminance * (2 * covariance + C2) / (var_a + var_b + C2))


def _blur(x: jax.Array) -> jax.Array:
    """Gaussian-weighted means of the 11x11 windows that lie inside: [B,H,W,C] -> [B,H-10,W-10,C].

    Sums of shifted slices: on a CPU six times as fast as a convolution of one channel.
    """
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps = [float(weight) for weight in weights / weights.sum()]
    height, width = x.shape[1] - WINDOW + 1, x.shape[2] - WINDOW + 1
    columns = sum(tap * x[:, i : i + height] for i, tap in enumerate(taps))
    columns = jax.lax.optimization_barrier(columns)  # or XLA fuses both passes into one of 121 taps
    return sum(tap * columns[:, :, i : i + width] for i, tap in enumerate(taps))
