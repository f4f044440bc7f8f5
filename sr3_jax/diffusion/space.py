"""What is diffused: the image itself (SR3), or the scaled residual to the upsampled low-res image.

The residual leaves the network only what the low-res image does not say. That is an easier target for small
networks (SRDiff, Li et al. 2021); the paper diffuses the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sr3_jax.types import Conditioning, Image


@dataclass(frozen=True)
class Space:
    """Maps between images [B,H,W,C] in [-1,1] and the diffused variable z of the same shape.

    Attributes:
        encode: (image, cond) -> z.
        decode: (z, cond) -> image, not clipped.
        clip: (z, cond) -> the nearest z whose image is in [-1,1]. The paper does not say whether y0 estimates are
            clipped while sampling; every port clips, and without it eps-prediction drifts in colour.
    """

    encode: Callable[[Image, Conditioning], jax.Array]
    decode: Callable[[jax.Array, Conditioning], Image]
    clip: Callable[[jax.Array, Conditioning], jax.Array]


def image() -> Space:
    """Diffuse the image itself, as the paper does."""
    return Space(
        encode=lambda y, cond: y,
        decode=lambda z, cond: z,
        clip=lambda z, cond: jnp.clip(z, -1.0, 1.0),
    )


def residual(scale: float) -> Space:
    """Diffuse z = scale * (image - cond['upsampled']).

    Args:
        scale: brings z to about unit variance, which the noise schedules assume: the inverse of the standard
            deviation of the residual in [-1,1] units (about 0.1 for photographs at 4x).
    """
    if not scale > 0:
        raise ValueError(f"residual scale must be above 0, got {scale}")
    return Space(
        encode=lambda y, cond: scale * (y - cond["upsampled"]),
        decode=lambda z, cond: z / scale + cond["upsampled"],
        clip=lambda z, cond: jnp.clip(
            z, scale * (-1.0 - cond["upsampled"]), scale * (1.0 - cond["upsampled"])
        ),
    )
