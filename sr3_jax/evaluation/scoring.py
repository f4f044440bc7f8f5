"""The images of an evaluation: what of them is upscaled, and how near outputs come. Pure, host side in and out.

Shape legend: B batch, H x W an original, h x w its low-res image, s the scale. Images are uint8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from sr3_jax import metrics
from sr3_jax.image_ops import degrade, to_uint8, to_unit, upsample

REVISION = 1  # of the metrics below: another one, and kept scores are computed anew from the kept images


def least_side(scales: Sequence[int]) -> int:
    """The shortest side in pixels that can be scored at all of these scales."""
    whole = [scale * -(-(metrics.WINDOW + 2 * scale) // scale) for scale in scales]
    return max([math.lcm(*scales), *whole])


def original_at(image: np.ndarray, scale: int, crop: int | None) -> np.ndarray:
    """An image's part that is upscaled to: the centre of `crop` squared, cut to a multiple of the scale."""
    height, width = image.shape[:2]
    if crop is not None:
        top, left = (height - crop) // 2, (width - crop) // 2
        image = image[top : top + crop, left : left + crop]
        height = width = crop
    return np.ascontiguousarray(image[: height // scale * scale, : width // scale * scale])


def low_res_of(originals: np.ndarray, scale: int) -> np.ndarray:
    """The low-res images uint8 [B,h,w,3] of originals uint8 [B,H,W,3]."""
    return np.asarray(_low_res(originals, scale=scale))


def interpolated(low_res: np.ndarray, scale: int) -> np.ndarray:
    """Bicubic interpolation of uint8 [B,h,w,3] to uint8 [B,s*h,s*w,3]."""
    return np.asarray(_bicubic(low_res, scale=scale))


def score(outputs: np.ndarray, originals: np.ndarray, low_res: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of outputs uint8 [B,H,W,3] by its name in a table, float32 [B]. Compiled once for each shape."""
    return jax.device_get(_scores(outputs, originals, low_res, scale=outputs.shape[1] // low_res.shape[1]))


@functools.partial(jax.jit, static_argnames="scale")
def _low_res(original: jax.Array, *, scale: int) -> jax.Array:
    return to_uint8(degrade(to_unit(original), scale))


@functools.partial(jax.jit, static_argnames="scale")
def _bicubic(low_res: jax.Array, *, scale: int) -> jax.Array:
    return to_uint8(upsample(to_unit(low_res), scale))


@functools.partial(jax.jit, static_argnames="scale")
def _scores(
    output: jax.Array, original: jax.Array, low_res: jax.Array, *, scale: int
) -> dict[str, jax.Array]:
    return {
        "psnr": metrics.psnr(output, original),
        "ssim": metrics.ssim(output, original),
        "psnr_luma": metrics.psnr_luma(output, original, crop=scale),
        "ssim_luma": metrics.ssim_luma(output, original, crop=scale),
        "consistency": metrics.consistency(output, low_res),
        "mean_colour_error": metrics.mean_colour_error(output, low_res),
    }
