"""A denoiser for images larger than the network should see at once: overlapping tiles, blended at every step.

All tiles share one noise field and are blended before the solver moves on, so that no seam can grow: neighbours
agree after every step rather than being cut and pasted at the end. Shape legend: B batch, H height, W width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.types import Conditioning, Denoiser, NoiseLevel


def tiled(denoiser: Denoiser, *, tile: int, overlap: int, stride: int = 1) -> Denoiser:
    """The same denoiser, applied to squares of `tile` pixels one after the other.

    Memory is that of one tile plus a few images. Images that fit one tile go through unchanged.

    Args:
        tile: side of a square, a multiple of the stride.
        overlap: least overlap of neighbours, over which one fades into the other.
        stride: the network's, which must divide the image's sides. Tiles start at its multiples, so that a pixel
            has the same place in the network's own grid of squares in each tile and in the whole image.
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

        def cut(field: jax.Array, corner: jax.Array) -> jax.Array:
            start = (0, corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(field, start, (batch, *size, field.shape[3]))

        def add(total: jax.Array, corner: jax.Array) -> tuple[jax.Array, None]:
            part = {name: cut(x, corner) if x.ndim == 4 else x for name, x in cond.items()}
            out = denoiser(cut(y_t, corner), gamma, part)
            return _add_at(total, jnp.concatenate([out * weight, weight], -1), corner), None

        total, _ = jax.lax.scan(add, jnp.zeros((batch, height, width, channels + 1)), corners)
        return total[..., :-1] / total[..., -1:]

    return denoise


def _add_at(total: jax.Array, part: jax.Array, corner: jax.Array) -> jax.Array:
    start = (0, corner[0], corner[1], 0)
    there = jax.lax.dynamic_slice(total, start, part.shape)
    return jax.lax.dynamic_update_slice(total, there + part, start)


def _starts(side: int, length: int, overlap: int, stride: int) -> list[int]:
    """Where the tiles of one axis start: evenly spread multiples of the stride, the last ending at the edge."""
    if side == length:
        return [0]
    way, step = (side - length) // stride, (length - overlap) // stride  # in strides
    count = -(-way // step)
    return [round(index * way / count) * stride for index in range(count + 1)]


def _fade(length: int, overlap: int) -> np.ndarray:
    """[length] weights that rise over `overlap` pixels at both ends; never 0, so that edges keep their one tile."""
    distance = np.minimum(np.arange(length) + 1, length - np.arange(length))
    return np.minimum(distance / (overlap + 1), 1.0)
