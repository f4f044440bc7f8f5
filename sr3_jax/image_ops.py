"""Image operations: uint8 <-> [-1,1], the one bicubic resize of this package, padding, sizes.

All are pure. Those that return a `jax.Array` may be called inside `jit`, with static sizes and scales. Shape legend:
B batch, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import Image as PillowImage

from sr3_jax.types import Image

Kernel = Callable[[np.ndarray], np.ndarray]
"""Weight by distance in pixels of the coarser grid; 0 from a distance of 2 on."""


def to_unit(image: jax.Array | np.ndarray) -> Image:
    """Levels 0 to 255, of any dtype, to float32 in [-1,1]. `to_uint8` inverts it exactly."""
    # An exact difference and one rounded product give the same bits inside and outside jit; x / 127.5 - 1 does not.
    return (jnp.asarray(image).astype(jnp.float32) - 127.5) * (1 / 127.5)


def to_uint8(image: jax.Array | np.ndarray) -> jax.Array:
    """[-1,1] to uint8: clipped, and rounded to the nearest level. The result for NaN is undefined."""
    levels = (jnp.asarray(image).astype(jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(levels), 0.0, 255.0).astype(jnp.uint8)


def resize_bicubic(x: jax.Array | np.ndarray, height: int, width: int) -> Image:
    """Resize like Pillow's BICUBIC, up or down.

    Keys' cubic kernel with a = -0.5, widened by the ratio when shrinking (anti-aliased). Pixel centers are at
    half-integers, so the outer edges of both images coincide. Taps outside the image are dropped and the weights of the
    others normalized, so a constant image stays constant. Overshoot is not clipped. The result is within 0.01/255 of
    Pillow's float mode.

    Args:
        x: floats [B,H,W,C].

    Returns:
        float32 [B,height,width,C].

    Raises:
        ValueError: x has integer dtype or is not [B,H,W,C]; a size is below 1.
    """
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"x must be [B,H,W,C], got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must have a float dtype, got {x.dtype}: convert uint8 pixels with to_unit")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height}x{width}")
    return _resize(x, height, width, _cubic)


def _resize(x: jax.Array | np.ndarray, height: int, width: int, kernel: Kernel) -> Image:
    x = jnp.asarray(x).astype(jnp.float32)
    return _resize_axis(_resize_axis(x, 1, height, kernel), 2, width, kernel)


def _resize_axis(x: jax.Array, axis: int, length: int, kernel: Kernel) -> jax.Array:
    """Resize one axis as a sum over the taps of the kernel, in memory proportional to the input and the output.

    A matrix product would need input length x output length weights: 6 GB for 20,000 pixels at 4x.
    """
    if x.shape[axis] == length:
        return x  # the kernel is 1 at its center and 0 at the other pixels
    symbolic = jax.export.is_symbolic_dim(x.shape[axis])
    positions, weights = (_symbolic_taps if symbolic else _taps)(x.shape[axis], length, kernel)
    shape = [1] * x.ndim
    shape[axis] = length
    out_shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])

    def add(total: jax.Array, tap: Any) -> tuple[jax.Array, None]:
        position, weight = tap
        return total + weight.reshape(shape) * jnp.take(x, position, axis=axis, mode="clip"), None

    return jax.lax.scan(add, jnp.zeros(out_shape, jnp.float32), (positions, weights))[0]


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - distance, 0.0)


def _taps(length: int, new_length: int, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """Positions int32 and weights float32, both [taps,new_length], of a resize of one axis; computed in float64."""
    ratio = length / new_length
    width = max(ratio, 1.0)
    center = (np.arange(new_length) + 0.5) * ratio - 0.5
    first = np.ceil(center - 2.0 * width).astype(np.int64)
    position = first + np.arange(math.floor(4.0 * width) + 1)[:, None]
    weights = kernel(np.abs(position - center) / width)
    weights = np.where((position >= 0) & (position < length), weights, 0.0)
    weights /= weights.sum(axis=0)
    used = np.any(weights != 0.0, axis=1)  # at integer ratios the last tap may be 0 everywhere
    return np.clip(position, 0, length - 1).astype(np.int32)[used], weights.astype(np.float32)[used]


def _symbolic_taps(length: Any, new_length: Any, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
    """`_taps` for lengths that are symbols of `jax.export`, of which one is a multiple of the other.

    The weights are those of any pixel far from the borders, normalized near them.
    """
    grow, shrink = _whole_ratio(new_length, length), _whole_ratio(length, new_length)
    if grow is None and shrink is None:
        raise ValueError(f"resizing from {length} to {new_length} needs known sizes")
    phases, step, middle = grow or 1, shrink or 1, 8  # 8 pixels from a border the kernel is complete
    positions, weights = _taps(2 * middle * step, 2 * middle * phases, kernel)
    columns = slice(middle * phases, (middle + 1) * phases)
    index = jnp.arange(new_length)
    offset = jnp.asarray(positions[:, columns] - middle * step)[:, index % phases]  # [taps,new_length]
    weight = jnp.asarray(weights[:, columns])[:, index % phases]
    position = (index // phases * step)[None] + offset
    inside = (position >= 0) & (position < length)
    weight = weight * inside
    whole = inside.all(axis=0, keepdims=True)
    return position, jnp.where(whole, weight, weight / weight.sum(axis=0, keepdims=True))


def _whole_ratio(length: Any, other: Any) -> int | None:
    """length / other, of symbols, if it is a whole number."""
    ratio = length // other
    known = not jax.export.is_symbolic_dim(ratio) and length == ratio * other
    return ratio if known and ratio >= 1 else None


def degrade(image: jax.Array | np.ndarray, scale: int) -> Image:
    """High-res [B,H,W,C] in [-1,1] to low-res [B,H/scale,W/scale,C]: bicubic downsampling, rounded to uint8 levels.

    The rounding makes training images equal to what an image file can store.

    Raises:
        ValueError: H or W is not divisible by scale.
    """
    height, width = image.shape[1:3]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"image of {height}x{width} is not divisible by scale {scale}: crop it first")
    return to_unit(to_uint8(resize_bicubic(image, height // scale, width // scale)))


def upsample(low_res: jax.Array | np.ndarray, scale: int, upsampling: str = "bicubic") -> Image:
    """Upsample low-res [B,h,w,C] to float32 [B,h*scale,w*scale,C], not clipped: the network's condition.

    Args:
        upsampling: 'bicubic', the paper's, or 'bilinear' with pixel centers at half-integers.
    """
    height, width = low_res.shape[1:3]
    if upsampling == "bilinear":
        return _resize(low_res, height * scale, width * scale, _linear)
    return resize_bicubic(low_res, height * scale, width * scale)


def back_project(image: Image, low_res: Image, scale: int, *, rounds: int) -> Image:
    """Make high-res [B,H,W,C] consistent with low-res [B,H/scale,W/scale,C]: downsampled, it then equals it.

    Each round adds the upsampled difference between the low-res image and the downsampled high-res image (Irani and
    Peleg 1991); the remaining difference shrinks geometrically.
    """
    height, width = low_res.shape[1:3]

    def one(_: int, image: Image) -> Image:
        return image + upsample(low_res - resize_bicubic(image, height, width), scale)

    return jax.lax.fori_loop(0, rounds, one, image)


def pad_image(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad a host array [B,H,W,C] at the bottom and right, with edge pixels, to [B,height,width,C]."""
    return np.pad(x, ((0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)), mode="edge")


def pad_batch(x: np.ndarray, size: int) -> np.ndarray:
    """Pad a host array [B,...] to [size,...] with copies of its last element, since programs compile per batch size."""
    return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def count_passes(outscale: float, scale: int) -> int:
    """How many times a model of this scale has to be applied to enlarge an image by at least `outscale`."""
    count = 1
    while scale > 1 and scale**count < outscale:
        count += 1
    return count


def scaled_size(size: tuple[int, int], outscale: float) -> tuple[int, int]:
    """(height, width) times `outscale`, each rounded to the nearest integer of at least 1."""
    height, width = (max(1, round(side * outscale)) for side in size)
    return height, width


def resize_lanczos(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [H,W,3] to (height, width) with Pillow's Lanczos filter, which antialiases; equal sizes pass."""
    if image.shape[:2] == size:
        return image
    lanczos = PillowImage.Resampling.LANCZOS
    # Columns first, as `image_io.bands.resize_bands`: Pillow 13 prefers rows for some sizes.
    columns = PillowImage.fromarray(image).resize((size[1], len(image)), lanczos)
    return np.asarray(columns.resize(size[::-1], lanczos))
