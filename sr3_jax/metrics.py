"""Image metrics as pure functions, and the one registry of every metric that this package reports.

The functions compare an output with its ground truth (PSNR, SSIM) or with its low-res image (consistency, mean
color error). Shape legend: B batch, H height, W width, C channels. They take uint8 images [B,H,W,C] (quantize
first, as an image file does) and return float32 [B], one value per image. Average over a data set in the metric's
own unit, e.g. PSNR in dB. Wrong dtypes and shapes raise ValueError.

There are two PSNR/SSIM protocols. They differ by 1-2 dB and must not be mixed in one table:
  psnr, ssim             RGB, levels 0..255, no border crop (SR3 and most diffusion papers)
  psnr_luma, ssim_luma   BT.601 luma only, borders cropped (the values usually published for Set5 and Set14)

`METRICS` holds the heading, number format, direction and protocol of each metric. Tables, the schedule search,
command-line choices and JSON files read it; add a metric there and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.image_ops import resize_bicubic

PEAK = 255.0
WINDOW = 11  # SSIM's Gaussian, side in pixels
SIGMA = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2
# Studio-range BT.601 luma: 219/255 of full range over a footroom of 16, as in MATLAB's rgb2ycbcr.
LUMA = (219 / 255 * 0.299, 219 / 255 * 0.587, 219 / 255 * 0.114)
LUMA_OFFSET = 16.0

Group = Literal["image", "classifier", "set", "samples", "time"]


@dataclass(frozen=True)
class Metric:
    """The properties of a metric that tables and searches use.

    Attributes:
        key: its name in JSON and CSV files and on the command line.
        heading: its name in tables.
        digits: digits after the decimal point; None: three significant digits.
        higher_is_better: None if neither direction is better, as for diversity.
        group: its input: 'image' (each output), 'classifier' (the classes of the outputs), 'set' (all
            outputs together, by their features), 'samples' (all samples of one input) or 'time'.
        protocol: how it is computed, one clause without a final period.
    """

    key: str
    heading: str
    digits: int | None
    higher_is_better: bool | None
    group: Group
    protocol: str

    def format(self, value: float | None, *, signed: bool = False) -> str:
        """A value as text, or a signed difference; None stands for infinity, which JSON cannot hold."""
        if value is None or math.isinf(value):
            return "inf"
        style = ".3g" if self.digits is None else f".{self.digits}f"
        return f"{value:{'+' if signed else ''}{style}}"


_FRECHET = "Frechet distance between the features of the first output of each image and the reference"
_KID = "kernel distance (unbiased squared MMD, unit 1e-3) between the same features of different images"
_KID += "; 0 for outputs that are distributed as the ground truth, below 0 by chance only"
_IS = "Inception score of the outputs"

METRICS: Mapping[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("psnr", "PSNR", 2, True, "image", "dB, RGB, levels 0-255, no border crop"),
        Metric(
            "ssim", "SSIM", 4, True, "image", "RGB, levels 0-255, no border crop, 11x11 Gaussian window of sigma 1.5"
        ),
        Metric(
            "psnr_luma", "PSNR-Y", 2, True, "image", "dB, BT.601 luma (16-235), borders as wide as the scale cropped"
        ),
        Metric("ssim_luma", "SSIM-Y", 4, True, "image", "SSIM of the same luma and crop as PSNR-Y"),
        Metric(
            "consistency", "consist.", 2, False, "image",
            "mean squared error between the output, downsampled by anti-aliased bicubic, and the low-res image; unit "
            "1e-5, range 0-1",
        ),
        Metric(
            "mean_color_error", "color", 2, False, "image",
            "largest difference between a channel's mean and that of the low-res image, in levels of 255",
        ),
        Metric("lpips", "LPIPS", 4, False, "image", "distance to the ground truth, RGB, uncropped, at full size"),
        Metric(
            "top1", "top-1 %", 1, True, "classifier", "outputs whose label is the most likely class of the classifier"
        ),
        Metric("top5", "top-5 %", 1, True, "classifier", "outputs whose label is among the five most likely classes"),
        Metric("fid", "FID", 2, False, "set", _FRECHET),
        Metric("kid", "KID", 2, False, "set", _KID),
        Metric("inception_score", "IS", 2, True, "set", _IS),
        Metric("frechet_alexnet", "Frechet (AlexNet)", 3, False, "set", _FRECHET),
        Metric("kid_alexnet", "KID (AlexNet)", None, False, "set", _KID),
        Metric("frechet_classifier", "Frechet (classifier)", 3, False, "set", _FRECHET),
        Metric("kid_classifier", "KID (classifier)", None, False, "set", _KID),
        Metric("frechet_inception_unknown", "Frechet (unknown Inception)", 2, False, "set", _FRECHET),
        Metric("kid_inception_unknown", "KID (unknown Inception)", None, False, "set", _KID),
        Metric("inception_score_inception_unknown", "IS (unknown Inception)", 2, True, "set", _IS),
        Metric(
            "diversity", "diversity", 2, None, "samples",
            "standard deviation (n - 1) over the outputs of one input, in levels of 255, averaged over pixels and "
            "channels",
        ),
        Metric(
            "diversity_lpips", "LPIPS of pairs", 4, None, "samples", "mean LPIPS over all pairs of outputs of one input"
        ),
        Metric("seconds", "s/image", None, False, "time", "wall time per image, compilation excluded"),
    )
}  # fmt: skip
"""Every metric by its key, in the order of a table's columns."""

SEARCH_METRICS = (*(key for key, metric in METRICS.items() if metric.group == "image"), "frechet")
"""The metrics that a schedule search can use, as `search_metric` takes them."""


def search_metric(name: str) -> Metric:
    """The metric of a schedule search; 'frechet' is short for the Frechet distance of AlexNet features."""
    return METRICS["frechet_alexnet" if name == "frechet" else name]


@jax.jit
def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB over pixels and channels, peak 255; +inf for identical images."""
    a, b = _levels(a, b)
    return _decibels(jnp.square(a - b))


@jax.jit
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004), at most 1: mean over channels and over the 11x11 windows inside.

    Gaussian window of sigma 1.5, K1 0.01, K2 0.03, population covariance: equal to scikit-image with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255`. ValueError if a side is
    shorter than 11 pixels.
    """
    return _ssim(*_levels(a, b))


@partial(jax.jit, static_argnames="crop")
def psnr_luma(a: jax.Array, b: jax.Array, *, crop: int) -> jax.Array:
    """PSNR in dB of the Y channel, peak 255, without `crop` border pixels (usually the scale).

    Y is not rounded; MATLAB's rgb2ycbcr of uint8 rounds it, which changes PSNR by about 0.01 dB.
    """
    a, b = _levels(a, b)
    return _decibels(jnp.square(_luma(a, crop) - _luma(b, crop)))


@partial(jax.jit, static_argnames="crop")
def ssim_luma(a: jax.Array, b: jax.Array, *, crop: int) -> jax.Array:
    """SSIM, as in `ssim`, of the Y channel, without `crop` border pixels."""
    a, b = _levels(a, b)
    return _ssim(_luma(a, crop), _luma(b, crop))


@partial(jax.jit, static_argnames="rows")
def consistency(output: jax.Array, low_res: jax.Array, *, rows: tuple[int, int] | None = None) -> jax.Array:
    """Mean squared error between the downsampled output and low_res; levels in [0,1], unit 1e-5.

    The output is downsampled by the anti-aliased bicubic that made low_res and clipped to the range of an image,
    but not rounded. The ground truth itself therefore has 0.13, the rounding error of low_res. The paper reports
    2.68 for SR3 on faces 16->128. With `rows`, only these rows of the low-res image count, from the first to before
    the second.
    Raises ValueError unless output is an integer multiple of low_res, the same in both directions.
    """
    output, low_res = _pair(output, low_res)
    shrunk = resize_bicubic(output, *low_res.shape[1:3])
    difference = (jnp.clip(shrunk, 0.0, PEAK) - low_res)[:, slice(*rows or (None,))]
    return 1e5 / PEAK**2 * _mean(jnp.square(difference))


@jax.jit
def mean_color_error(output: jax.Array, low_res: jax.Array) -> jax.Array:
    """Largest difference between a channel's mean in output and in low_res, in levels of 255."""
    output, low_res = _pair(output, low_res)
    shift = jnp.mean(output, axis=2).mean(axis=1) - jnp.mean(low_res, axis=2).mean(axis=1)  # [B,C]
    return jnp.max(jnp.abs(shift), axis=1)


def _levels(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two images of the same shape as float32 levels."""
    if a.shape != b.shape:
        raise ValueError(f"images to compare must have the same shape, got {a.shape} and {b.shape}")
    return _float(a), _float(b)


def _pair(output: jax.Array, low_res: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An output and its low-res image as float32 levels."""
    result = _float(output), _float(low_res)
    (batch, height, width, channels), small = output.shape, low_res.shape
    scale = height // max(small[1], 1)
    if scale < 1 or (batch, height, width, channels) != (
        small[0],
        scale * small[1],
        scale * small[2],
        small[3],
    ):
        raise ValueError(f"output {output.shape} must be an integer multiple of low_res {low_res.shape}")
    return result


def _float(image: jax.Array) -> jax.Array:
    if image.ndim != 4 or image.dtype != jnp.uint8:
        raise ValueError(f"metrics take uint8 images [B,H,W,C], got {image.dtype} {image.shape}")
    return image.astype(jnp.float32)


def _mean(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B]. Rows first: the accuracy then does not depend on how a backend orders a long sum."""
    return jnp.mean(jnp.mean(x, axis=(2, 3)), axis=1)


def _decibels(squared_error: jax.Array) -> jax.Array:
    return 10.0 * jnp.log10(PEAK**2 / _mean(squared_error))


def _luma(image: jax.Array, crop: int) -> jax.Array:
    """RGB levels [B,H,W,3] -> Y in [16,235], [B,H-2*crop,W-2*crop,1]."""
    _, height, width, channels = image.shape
    if channels != 3:
        raise ValueError(f"luma needs 3 channels, got {channels}")
    if crop < 0 or min(height, width) <= 2 * crop:
        raise ValueError(f"crop={crop} leaves no pixels of a {height}x{width} image")
    red, green, blue = (image[:, crop : height - crop, crop : width - crop, c : c + 1] for c in range(3))
    return LUMA_OFFSET + LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 levels [B,H,W,C] -> [B]."""
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW}x{WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}")
    # A variance is a difference of squares; after subtracting the image's mean they are small and lose few digits.
    shift_a, shift_b = (jnp.round(jnp.mean(x, axis=(1, 2), keepdims=True)) for x in (a, b))  # [B,1,1,C]
    a, b = a - shift_a, b - shift_b
    mean_a, mean_b, aa, bb, ab = jnp.split(_blur(jnp.concatenate([a, b, a * a, b * b, a * b])), 5)
    var_a, var_b, covariance = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
    mean_a, mean_b = mean_a + shift_a, mean_b + shift_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a * mean_a + mean_b * mean_b + C1)
    return _mean(luminance * (2 * covariance + C2) / (var_a + var_b + C2))


def _blur(x: jax.Array) -> jax.Array:
    """Gaussian-weighted means of the 11x11 windows inside the image: [B,H,W,C] -> [B,H-10,W-10,C].

    A sum of shifted slices, six times as fast on a CPU as a single-channel convolution.
    """
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    taps = [float(weight) for weight in weights / weights.sum()]
    height, width = x.shape[1] - WINDOW + 1, x.shape[2] - WINDOW + 1
    columns = sum(tap * x[:, i : i + height] for i, tap in enumerate(taps))
    columns = jax.lax.optimization_barrier(columns)  # keeps XLA from fusing both passes into one of 121 taps
    return sum(tap * columns[:, :, i : i + width] for i, tap in enumerate(taps))
