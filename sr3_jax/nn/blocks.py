"""The layers of the U-Net: residual block, attention, resampling, normalization, embeddings.

Activations have the compute dtype; normalization, softmax and the embedding are float32. Shape legend: B batch,
H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LOG_SNR_LIMIT = 20.0
RESIDUAL_SCALE = 1.0 / math.sqrt(2.0)  # so that x + h has the variance of x (paper section 2.4)
zeros = nn.initializers.zeros_init()


def space_to_depth(x: jax.Array, factor: int) -> jax.Array:
    """[B,H,W,C] -> [B,H/factor,W/factor,factor^2 C]; lossless."""
    if factor == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    if factor == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // (factor * factor))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // (factor * factor))


def average_pool(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,H/2,W/2,C]: the mean of each 2x2 block."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


def nearest_upsample(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,2H,2W,C]: each pixel becomes a 2x2 block."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def sinusoidal(value: jax.Array, width: int, low: float, high: float) -> jax.Array:
    """[B] -> [B,width]: cosines and sines at width/2 geometric frequencies from `low` to `high` radians per unit."""
    frequencies = jnp.asarray(np.geomspace(low, high, width // 2), jnp.float32)
    angle = value.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def log_snr_features(gamma: jax.Array, width: int) -> jax.Array:
    """[B] gamma -> [B,width] sinusoids of the log-SNR ln(gamma / (1 - gamma)), clipped to [-20, 20].

    The paper does not say how gamma is embedded. gamma itself is almost constant at either end of the schedule, where
    its sinusoids would be nearly equal; the log-SNR is monotone in gamma and changes evenly.
    """
    log_snr = jnp.log(gamma) - jnp.log1p(-gamma)  # +inf at gamma = 1; clipped below
    return sinusoidal(jnp.clip(log_snr, -LOG_SNR_LIMIT, LOG_SNR_LIMIT), width, 0.1, 20.0)


class Norm(nn.Module):
    """Normalization in float32 with a learned scale (and offset, for groups); returns the dtype of x.

    Attributes:
        kind: 'group' is the paper's GroupNorm. Its statistics are over the whole image, so the size of the image and
            distant content change a pixel. 'pixel' is RMSNorm over the channels of each pixel: the output at a pixel
            then depends only on its receptive field, for any image size.
    """

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == "pixel":
            return nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32)(x).astype(x.dtype)
        channels = x.shape[-1]
        # 32 groups as in DDPM, but of at least 4 channels: statistics of smaller groups are too noisy.
        groups = next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
        return nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32)(x).astype(x.dtype)


def conv(
    channels: int,
    kernel: int,
    dtype: jnp.dtype,
    init: Callable | None = None,
    name: str | None = None,
    precision: jax.lax.Precision | None = None,
) -> nn.Conv:
    """A stride-1 convolution with 'SAME' padding and float32 weights, computed in `dtype`.

    Even in float32, without `precision` a TPU multiplies in bfloat16 and an NVIDIA GPU in TF32.
    """
    return nn.Conv(
        channels,
        (kernel, kernel),
        dtype=dtype,
        kernel_init=init or nn.initializers.lecun_normal(),
        precision=precision,
        name=name,
    )


class ResidualBlock(nn.Module):
    """BigGAN's residual block, conditioned on an embedding (paper section 2.4).

    Attributes:
        channels: of the output.
        norm: 'group' or 'pixel'; see `Norm`.
        resample: 'up' or 'down' by 2 before the first convolution, on both branches; None for no resampling.
        film: the embedding scales and shifts the output of the second norm; otherwise it is added before the norm.
        dropout: rate before the second convolution, in training.
    """

    channels: int
    norm: str
    dtype: jnp.dtype
    resample: str | None = None
    film: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.swish(Norm(self.norm)(x))
        if self.resample is not None:
            change = {"up": nearest_upsample, "down": average_pool}[self.resample]
            x, h = change(x), change(h)
        h = conv(self.channels, 3, self.dtype)(h)
        width = 2 * self.channels if self.film else self.channels
        condition = nn.Dense(width, name="embedding")(nn.swish(embedding))[:, None, None, :].astype(
            self.dtype
        )
        if self.film:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = Norm(self.norm)(h) * (1 + scale) + shift
        else:
            h = Norm(self.norm)(h + condition)
        h = nn.Dropout(self.dropout)(nn.swish(h), deterministic=not train)
        h = conv(self.channels, 3, self.dtype, zeros)(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, name="skip")(x)
        return (x + h) * RESIDUAL_SCALE


class Attention(nn.Module):
    """Self-attention over all pixels with a residual connection; softmax in float32.

    Attributes:
        norm: 'group' or 'pixel'; see `Norm`.
        head_channels: channels per head; 0 for a single head, as in DDPM.
    """

    norm: str
    dtype: jnp.dtype
    head_channels: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        heads = c // self.head_channels if self.head_channels else 1
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(Norm(self.norm)(x))
        query, key, value = jnp.moveaxis(qkv.reshape(b, h * w, 3, heads, c // heads), 2, 0)
        attended = jax.nn.dot_product_attention(query, key, value).reshape(b, h, w, c)
        out = nn.Dense(c, dtype=self.dtype, kernel_init=zeros, name="out")(attended)
        return (x + out) * RESIDUAL_SCALE
