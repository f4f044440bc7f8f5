"""A Frechet distance where the weights of FID's Inception are missing: in AlexNet's features, and named so.

Never call it FID: 'frechet_alexnet' ranks outputs against one another in one table, and its figures compare with no
published one. The weights are those of LPIPS, which a package carries.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.features.lpips import Lpips, Weights, alexnet
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.image_ops import resize_bicubic

SIDE = 224  # pixels: the size of AlexNet's own training


@dataclass(frozen=True)
class AlexNetFeatures:
    """The last convolution of LPIPS's AlexNet, averaged over the places: 256 numbers an image.

    So few that some hundred images give a covariance of full rank, where Inception's 2048 need thousands.
    """

    lpips: Lpips

    @property
    def protocol(self) -> FeatureProtocol:
        return FeatureProtocol(
            network="alexnet-relu5-mean",
            distance="frechet_alexnet",
            weights_sha256=self.lpips.sha256,
            preprocessing=f"anti-aliased bicubic to {SIDE}x{SIDE}, clipped to levels 0..255",
        )

    def features(self, images: jax.Array | np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] of any size -> float32 [B,256]. ValueError on other types."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"AlexNet takes uint8 images [B,H,W,3], got {images.dtype} {images.shape}")
        return np.asarray(_features(self.lpips.weights, _resized(jnp.asarray(images))))


@jax.jit
def _resized(images: jax.Array) -> jax.Array:
    return jnp.clip(resize_bicubic(images.astype(jnp.float32), SIDE, SIDE), 0.0, 255.0)


@jax.jit
def _features(weights: Weights, x: jax.Array) -> jax.Array:
    return jnp.mean(alexnet(weights, x)[-1], axis=(1, 2))
