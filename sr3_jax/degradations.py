"""Conditioning augmentation: a stage that has seen blurred or noisy low-res images forgives the stage before it.

The paper blurs the low-res image of a cascade's stage in training and not when sampling (section 4.4); Ho et al. 2021
("Cascaded Diffusion Models") blur half of the examples and find noise better at low resolutions; Saharia et al. 2022
(Imagen) tell the network the strength. Here: blur or noise, on a share of the examples, of a strength in [0,1] that the
network may be told.

Shape legend: B batch, H height, W width, C channels. Pure jax; images are float32 in [-1,1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from sr3_jax.types import Image, Key

AugmentationKind = Literal["blur", "noise"]


@dataclass(frozen=True)
class ConditioningAugmentation:
    """What is done to low-res images in training.

    Attributes:
        kind: 'blur', Gaussian; or 'noise', Gaussian, the image scaled so that the variance stays (a diffusion step).
        largest: at strength 1: the blur's standard deviation in low-res pixels, above 0; the noise's, 1 at most.
        share: of the examples that are augmented, each by a strength of its own, uniform in (0,1); the others stay.
    """

    kind: AugmentationKind
    largest: float
    share: float = 0.5

    def sample(self, key: Key, low_res: Image) -> tuple[Image, jax.Array]:
        """Augment some of low_res [B,H,W,C]: the result and each example's strength [B], 0 where it stayed."""
        strength_key, share_key, noise_key = jax.random.split(key, 3)
        batch_size = low_res.shape[0]
        strength = jax.random.uniform(strength_key, (batch_size,))
        strength = jnp.where(jax.random.bernoulli(share_key, self.share, (batch_size,)), strength, 0.0)
        return self.apply(noise_key, low_res, strength), strength

    def apply(self, key: Key, low_res: Image, strength: jax.Array) -> Image:
        """low_res [B,H,W,C] at a given strength [B] in [0,1], exactly itself at 0.

        Args:
            key: one key for the batch, or [B] keys, which make each example independent of its batch.
        """
        if self.kind == "blur":
            return blur(low_res, self.largest * strength, reach=math.ceil(3 * self.largest))
        if key.ndim == 0:
            noise = jax.random.normal(key, low_res.shape)
        else:
            noise = jax.vmap(lambda one: jax.random.normal(one, low_res.shape[1:]))(key)
        variance = jnp.square(self.largest * strength)[:, None, None, None]
        return jnp.sqrt(1.0 - variance) * low_res + jnp.sqrt(variance) * noise


def blur(x: Image, sigma: jax.Array, *, reach: int) -> Image:
    """Gaussian blur of x [B,H,W,C], each example by its own sigma [B] in pixels, exactly itself at 0.

    The kernel is cut off `reach` pixels from its centre; beyond the edges the edge pixels go on.
    """
    places = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    # At sigma 0 all weights but the middle one underflow to 0.
    spread = jnp.square(places)[None, :] / jnp.square(jnp.maximum(sigma, 1e-3))[:, None]  # [B,K]
    weights = jnp.exp(-0.5 * spread)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    for axis in (1, 2):
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, padding, mode="edge")
        parts = (
            weights[:, k, None, None, None] * jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis)
            for k in range(2 * reach + 1)
        )
        x = sum(parts, jnp.zeros_like(x))
    return x
