"""Pure image maths: uint8 <-> [-1,1], the one bicubic of this package, padding, image grids.

Shape legend: B batch, H height, W width, C channels. Everything but `image_grid` is jax, pure, and may be
called inside `jit`; sizes and scales are static.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.types import Image


def to_unit(image: jax.Array | np.ndarray) -> Image:
    """Levels 0..255 of any dtype -> float32 in [-1,1]. `to_uint8` is its exact inverse on the 256 levels."""
    # An exact difference and one product: the same bits inside and outside jit, where x / 127.5 - 1 has two.
    return (jnp.asarray(image).astype(jnp.float32) - 127.5) * (1 / 127.5)


def to_uint8(image: jax.Array | np.ndarray) -> jax.Array:
    """[-1,1] -> uint8: clipped, rounded to the nearest level (for a NaN the result is undefined)."""
    levels = (jnp.asarray(image).astype(jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(levels), 0.0, 255.0).astype(jnp.uint8)


def resize_bicubic(x: jax.Array | np.ndarray, height: int, width: int) -> Image:
    """Resize floats [B,H,W,C] to float32 [B,height,width,C] as Pillow's BICUBIC does, up or down.

    Keys' cubic with a = -0.5, widened by the ratio when shrinking (anti-aliased). Pixel centres lie at
    half-integers, so the outer edges of both images coincide; taps outside the image are dropped and the rest
    sum to one again, so a flat image stays flat. Overshoot is not clipped. Within 0.01/255 of Pillow's float
    mode at whole ratios of any size; at odd ratios of sides above 1000, float32 positions cost up to 0.1/255.
    Raises ValueError for integer pixels (take `to_unit` first), for another rank, and for a size below 1.
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"resize_bicubic takes [B,H,W,C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"resize_bicubic takes floats, got {x.dtype}: take to_unit of uint8 pixels")
    if height < 1 or width < 1:
        raise ValueError(f"resize_bicubic cannot resize to {height}x{width}: both sides must be at least 1")
    shape = (x.shape[0], height, width, x.shape[3])
    # Two matrix products. HIGHEST, or TPU's bfloat16 and NVIDIA's TF32 passes would cost up to a grey level.
    precision = jax.lax.Precision.HIGHEST
    return jax.image.resize(x.astype(jnp.float32), shape, "cubic", antialias=True, precision=precision)


def degrade(image: jax.Array | np.ndarray, scale: int) -> Image:
    """High-res [B,H,W,C] in [-1,1] -> low_res [B,H/scale,W/scale,C]: bicubic down, on the 256 uint8 levels.

    The rounding is part of the task: the network then sees in training what a low-res image file can hold.
    Raises ValueError if H or W is not divisible by scale.
    """
    height, width = image.shape[1:3]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"image of {height}x{width} is not divisible by scale {scale}: crop it first")
    return to_unit(to_uint8(resize_bicubic(image, height // scale, width // scale)))


def upsample(low_res: jax.Array | np.ndarray, scale: int) -> Image:
    """Low-res [B,h,w,C] -> [B,h*scale,w*scale,C] float32: the network's condition, not clipped."""
    height, width = low_res.shape[1:3]
    return resize_bicubic(low_res, height * scale, width * scale)


def pad_image(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """[B,H,W,C] on the host -> [B,height,width,C], padded at the bottom and right with its edge pixels."""
    return np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)), mode="edge")


def pad_batch(x: np.ndarray, size: int) -> np.ndarray:
    """[B,...] on the host -> [size,...], padded with copies of the last element: programs compile per batch size."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])
