"""A small residual classifier, which experiments/train_classifier.py trains and `sr3 evaluate` loads.

Shape legend: B batch, H height, W width, C channels, D features, K classes. It uses group norms, so that the logits
of an image do not depend on the others, and float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr3_jax.nn.blocks import Norm, space_to_depth, zeros


class _Residual(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; `stride` 2 halves the sides, rounding up."""

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(Norm("group")(x))
        skip = x
        if x.shape[-1] != self.channels or self.stride > 1:
            skip = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False, name="skip")(h)
        h = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False)(h)
        h = nn.relu(Norm("group")(h))
        return skip + nn.Conv(self.channels, (3, 3), use_bias=False, kernel_init=zeros)(h)


class ClassifierNetwork(nn.Module):
    """Images [B,H,W,3] in [-1,1], always of the same size -> (features [B,D], logits [B,K]), D = 4 * width.

    Attributes:
        num_classes: K.
        width: channels of the first of three resolutions; the others have twice and four times as many.
        patch: side of the patches in pixels that become one position of the first resolution.
        blocks: residual blocks per resolution.
        dropout: rate before the last layer, in training.
    """

    num_classes: int
    width: int = 32
    patch: int = 2
    blocks: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        margins = [(0, -side % self.patch) for side in x.shape[1:3]]
        x = space_to_depth(jnp.pad(x, ((0, 0), *margins, (0, 0)), mode="edge"), self.patch)
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(x)
        for level in range(3):
            for block in range(self.blocks):
                x = _Residual(self.width * 2**level, 2 if level and not block else 1)(x)
        x = nn.relu(Norm("group")(x))
        # Flattened instead of pooled: positions help to distinguish faces and clothes, and training takes fewer steps.
        features = nn.relu(nn.Dense(4 * self.width, name="features")(x.reshape(len(x), -1)))
        h = nn.Dropout(self.dropout)(features, deterministic=not train)
        return features, nn.Dense(self.num_classes, kernel_init=zeros, name="head")(h)
