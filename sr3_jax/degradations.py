"""Conditioning augmentation: a model trained on degraded low-res images tolerates the errors of the stage before it.

The paper blurs the low-res images of a cascade's stage in training, but not in sampling (section 4.3). Ho et al. 2021
("Cascaded Diffusion Models") blur half of the examples and find noise better at low resolutions. Saharia et al. 2022
(Imagen) condition the network on the strength. Here a fraction of the examples is blurred or noised by a random
strength in [0,1], which the network may take as an input.

Images are float32 in [-1,1]. Shape legend: B batch, H height, W width, C channels.
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
    """The augmentation of low-res images in training.

    Attributes:
        kind: 'blur' (Gaussian) or 'noise' (variance-preserving Gaussian, as in diffusion).
        largest: standard deviation at strength 1: for blur in low-res pixels, above 0; for noise at most 1.
        share: fraction of the examples that are augmented, each with a strength uniform in (0,1).
    """

    kind: AugmentationKind
    largest: float
    share: float = 0.5

    def sample(self, key: Key, low_res: Image) -> tuple[Image, jax.Array]:
        """Augment low_res [B,H,W,C] at random. Returns the images and strengths [B], 0 if not augmented."""
        strength_key, share_key, noise_key = jax.random.split(key, 3)
        batch_size = low_res.shape[0]
        strength = jax.random.uniform(strength_key, (batch_size,))
        strength = jnp.where(jax.random.bernoulli(share_key, self.share, (batch_size,)), strength, 0.0)
        return self.apply(noise_key, low_res, strength), strength

    def apply(self, key: Key, low_res: Image, strength: jax.Array) -> Image:
        """Augment low_res [B,H,W,C] with given strengths [B] in [0,1]; at 0 an image is unchanged, bit for bit.

        Args:
            key: one key for the batch, or [B] keys, which make each example independent of the rest of its batch.
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
    """Gaussian blur of x [B,H,W,C] with edge padding; at sigma 0 an image is unchanged, bit for bit.

    Args:
        sigma: [B] standard deviations in pixels.
        reach: the kernel is truncated this many pixels from its center.
    """
    offsets = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    # At sigma 0 all weights but the central one underflow to 0.
    squared = jnp.square(offsets)[None, :] / jnp.square(jnp.maximum(sigma, 1e-3))[:, None]  # [B,K]
    weights = jnp.exp(-0.5 * squared)
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
