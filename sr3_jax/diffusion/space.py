"""The diffused variable: the image itself (SR3), or its scaled residual to the upsampled low-res image.

The residual is an easier target for small networks (SRDiff, Li et al. 2021), which then predict only the detail that
the low-res image lacks.
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
            clipped in sampling; other implementations do, and without it the colors drift with eps-prediction.
    """

    encode: Callable[[Image, Conditioning], jax.Array]
    decode: Callable[[jax.Array, Conditioning], Image]
    clip: Callable[[jax.Array, Conditioning], jax.Array]


def image() -> Space:
    """Diffuse the image itself, as in the paper."""
    return Space(
        encode=lambda y, cond: y,
        decode=lambda z, cond: z,
        clip=lambda z, cond: jnp.clip(z, -1.0, 1.0),
    )


def residual(scale: float) -> Space:
    """Diffuse z = scale * (image - cond['upsampled']).

    Args:
        scale: the inverse of the residual's standard deviation in [-1,1] units, which is about 0.1 for photographs at
            4x, so that z has about unit variance, as noise schedules assume.
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
