"""Names for the types that every room shares. Shape legend: B batch, H height, W width, C channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

Image = jax.Array  # [B,H,W,C] float32, [-1,1] unless a docstring says uint8
NoiseLevel = jax.Array  # [B] gamma in (0,1]: the share of signal variance left, DDPM's alpha-bar
Key = jax.Array  # a typed PRNG key, as jax.random.key makes it
Params = Mapping[str, Any]  # a pytree of arrays
Conditioning = Mapping[str, jax.Array]
"""What the network sees besides y_t and gamma; the core passes it through unread.

'upsampled' [B,H,W,C] the bicubic-upsampled low-res image; 'label' [B] int32 class; 'augment' [B] strength of
the augmentation of the condition, in [0,1]. Each is optional.
"""


class Denoiser(Protocol):
    """The network as the diffusion core sees it."""

    def __call__(self, y_t: Image, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        """Predict eps, v or y0 (the caller knows which): [B,H,W,C] float32 from y_t [B,H,W,C], gamma [B]."""
        ...
