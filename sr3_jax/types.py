"""Types shared by all packages. Shape legend: B batch, H height, W width, C channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

Image = jax.Array  # [B,H,W,C] float32 in [-1,1], unless a docstring says uint8
NoiseLevel = jax.Array  # [B] gamma in (0,1]: signal power, DDPM's alpha-bar
Key = jax.Array  # a typed PRNG key, as returned by jax.random.key
Params = Mapping[str, Any]  # a pytree of weights
Conditioning = Mapping[str, jax.Array]
"""Inputs of the network other than y_t and gamma; the diffusion core passes them through.

All optional: 'upsampled' [B,H,W,C], the bicubic-upsampled low-res image; 'label' [B] int32; 'augment' [B] in [0,1], the
strength of the conditioning augmentation.
"""


class Denoiser(Protocol):
    """The network as a function, with its weights bound."""

    def __call__(self, y_t: Image, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        """Predict eps, v or y0 as [B,H,W,C] float32, from y_t [B,H,W,C] and gamma [B]."""
        ...
