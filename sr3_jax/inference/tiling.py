"""Apply a denoiser to large images in overlapping tiles that are blended at every step.

All tiles share one noise image, and their predictions are blended before the next step of the solver. Neighboring tiles
therefore agree at every step, and no seams can form. Shape legend: B batch, H height, W width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.types import Conditioning, Denoiser, NoiseLevel


def tiled(denoiser: Denoiser, *, tile: int, overlap: int, stride: int = 1) -> Denoiser:
    """A denoiser that applies `denoiser` to one square tile after the other.

    It needs the memory of one tile plus a few images. An image that fits into one tile is passed through.

    Args:
        tile: side of a tile in pixels, a multiple of the stride.
        overlap: minimum overlap of neighboring tiles in pixels, over which they are blended.
        stride: of the network; it must divide H and W. Tiles start at its multiples, so that downsampling groups the
            same pixels in a tile as in the whole image.

    Raises:
        ValueError: `tile` is not a multiple of the stride, or the overlap is out of range.
    """
    if tile % stride:
        raise ValueError(f"tile must be a multiple of the stride of {stride}, got {tile}")
    if not 0 <= overlap <= tile - stride:
        raise ValueError(f"overlap must be from 0 to tile - stride = {tile - stride}, got {overlap}")

    def denoise(y_t: jax.Array, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        batch, height, width, channels = y_t.shape
        size = (min(tile, height), min(tile, width))
        if size == (height, width):
            return denoiser(y_t, gamma, cond)
        starts = [
            _starts(side, length, overlap, stride) for side, length in zip((height, width), size, strict=True)
        ]
        corners = jnp.asarray([(top, left) for top in starts[0] for left in starts[1]])  # [tiles,2]
        window = np.outer(_fade(size[0], overlap), _fade(size[1], overlap)).astype(np.float32)
        weight = jnp.broadcast_to(jnp.asarray(window)[None, :, :, None], (batch, *size, 1))

        def crop(x: jax.Array, corner: jax.Array) -> jax.Array:
            start = (0, corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(x, start, (batch, *size, x.shape[3]))

        def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
            tile_cond = {name: crop(x, corner) if x.ndim == 4 else x for name, x in cond.items()}
            out = denoiser(crop(y_t, corner), gamma, tile_cond)
            return _add_at(total, jnp.concatenate([out * weight, weight], -1), corner), None

        total, _ = jax.lax.scan(add, jnp.zeros((batch, height, width, channels + 1)), corners)
        return total[..., :-1] / total[..., -1:]

    return denoise


def _add_at(total: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
    start = (0, corner[0], corner[1], 0)
    before = jax.lax.dynamic_slice(total, start, part.shape)
    return jax.lax.dynamic_update_slice(total, before + part, start)


def _starts(side: int, length: int, overlap: int, stride: int) -> list[int]:
    """Starts of the tiles along one axis: evenly spaced multiples of the stride; the last tile ends at the edge."""
    if side == length:
        return [0]
    last, step = (side - length) // stride, (length - overlap) // stride  # in strides
    count = -(-last // step)
    return [round(index * last / count) * stride for index in range(count + 1)]


def _fade(length: int, overlap: int) -> np.ndarray:
    """[length] blending weights that rise over `overlap` pixels at both ends; above 0, as edges have one tile only."""
    distance = np.minimum(np.arange(length) + 1, length - np.arange(length))
    return np.minimum(distance / (overlap + 1), 1.0)
