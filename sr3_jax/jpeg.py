"""JPEG compression as a pure function on the device: baseline coding without its lossless part.

The result is what a decoder shows after an encoder of the Independent JPEG Group's kind: their quantization tables
scaled by the quality (ITU T.81, annex K.1), color subsampled by 2 in both directions (4:2:0), and the decoder's
triangle filter for upsampling it. Shape legend: H height, W width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# ITU T.81, tables K.1 and K.2
_LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float32,
)
_CHROMA = np.full((8, 8), 99, np.float32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# Orthonormal DCT-II of 8 samples: row k is the k-th basis function.
_DCT = np.sqrt(2 / 8) * np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(8) + 1) / 16)
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)

# JFIF: RGB to luma and color differences
_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]], np.float32
)
_TO_RGB = np.linalg.inv(_TO_YCC.astype(np.float64)).astype(np.float32)
_EXACT = jax.lax.Precision.HIGHEST


def compress(image: jax.Array, quality: jax.Array) -> jax.Array:
    """Compress and decompress an RGB image.

    Args:
        image: [H,W,3] levels from 0 to 255, rounded first.
        quality: scalar from 1 to 100, as in libjpeg and Pillow.

    Returns:
        float32 [H,W,3], whole levels from 0 to 255.
    """
    height, width = image.shape[:2]
    # An encoder repeats the last row and column up to whole blocks of 16x16 pixels.
    padded = jnp.pad(_levels(image), ((0, -height % 16), (0, -width % 16), (0, 0)), mode="edge")
    ycc = jnp.round(jnp.einsum("hwc,dc->hwd", padded, _TO_YCC, precision=_EXACT))
    luma, chroma = ycc[..., 0] - 128.0, _halve(ycc[..., 1:])
    luma = _code(luma[..., None], _table(_LUMA, quality))[..., 0] + 128.0
    chroma = _double(_code(chroma, _table(_CHROMA, quality)))
    ycc = jnp.concatenate([_levels(luma)[..., None], jnp.clip(chroma, -128.0, 127.0)], axis=-1)
    rgb = jnp.einsum("hwc,dc->hwd", ycc, _TO_RGB, precision=_EXACT)
    return _levels(rgb)[:height, :width]


def _levels(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x), 0.0, 255.0)


def _table(base: np.ndarray, quality: jax.Array) -> jax.Array:
    """libjpeg's scaling of a quantization table."""
    quality = jnp.clip(jnp.round(quality), 1.0, 100.0)
    percent = jnp.where(quality < 50, jnp.floor(5000.0 / quality), 200.0 - 2.0 * quality)
    return jnp.clip(jnp.floor((base * percent + 50.0) / 100.0), 1.0, 255.0)


def _code(channels: jax.Array, table: jax.Array) -> jax.Array:
    """Transform, quantize and transform back the 8x8 blocks of [H,W,C] around 0; whole levels."""
    height, width, count = channels.shape
    blocks = channels.reshape(height // 8, 8, width // 8, 8, count)
    waves = jnp.einsum("ui,aibjc,vj->aubvc", _DCT, blocks, _DCT, precision=_EXACT)
    steps = table[None, :, None, :, None]
    blocks = jnp.einsum(
        "ui,aubvc,vj->aibjc", _DCT, _round_half_away(waves / steps) * steps, _DCT, precision=_EXACT
    )
    return jnp.clip(jnp.round(blocks), -128.0, 127.0).reshape(height, width, count)


def _round_half_away(x: jax.Array) -> jax.Array:
    # As libjpeg; ties are frequent, since flat blocks have whole multiples of 1/8.
    return jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)


def _halve(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels; halves are rounded down and up in alternating columns, as libjpeg does."""
    height, width, count = x.shape
    total = x.reshape(height // 2, 2, width // 2, 2, count).sum(axis=(1, 3))
    bias = 1.0 + (jnp.arange(width // 2) % 2)
    return jnp.floor((total + bias[None, :, None]) / 4.0)


def _double(x: jax.Array) -> jax.Array:
    """Upsample [h,w,C] to [2h,2w,C] with weights 3/4 and 1/4 of the nearest samples, as libjpeg's decoder does."""
    rows = _interleave(x, axis=0)
    columns = _interleave(rows, axis=1)
    bias = jnp.where(jnp.arange(columns.shape[1]) % 2 == 0, 8.0, 7.0)
    return jnp.floor((columns + bias[None, :, None]) / 16.0)


def _interleave(x: jax.Array, *, axis: int) -> jax.Array:
    """Four times the upsampled values along an axis."""
    edges = [(1, 1) if a == axis else (0, 0) for a in range(3)]
    padded, length = jnp.pad(x, edges, mode="edge"), x.shape[axis]
    before = jax.lax.slice_in_dim(padded, 0, length, axis=axis)
    after = jax.lax.slice_in_dim(padded, 2, length + 2, axis=axis)
    pair = jnp.stack([3.0 * x + before, 3.0 * x + after], axis=axis + 1)
    shape = tuple(2 * side if a == axis else side for a, side in enumerate(x.shape))
    return pair.reshape(shape)
