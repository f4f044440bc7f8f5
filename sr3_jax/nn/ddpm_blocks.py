"""Residual block and attention of the networks that descend from DDPM (Ho et al. 2020), as `AdmUNet` and `Sr3PortUNet`.

Unlike those in `blocks`, sums are not scaled by 1/sqrt(2), and every normalization has the same number of groups.
Shape legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr3_jax.nn.blocks import GroupNorm, attend, average_pool, conv, nearest_upsample, zeros


def group_norm(x: jax.Array, groups: int, name: str) -> jax.Array:
    """Group normalization in float32; the dtype of x."""
    return GroupNorm(groups, name=name)(x)


def output_layers(x: jax.Array, groups: int, channels: int) -> jax.Array:
    """The last normalization and convolution, in float32."""
    x = nn.swish(group_norm(x.astype(jnp.float32), groups, "norm_out"))
    return conv(channels, 3, jnp.float32, zeros, "conv_out", jax.lax.Precision.HIGHEST)(x)


def maybe_remat(module: Any, network: Any, **options: Any) -> Any:
    """A module that recomputes its activations in the backward pass, if its network does."""
    return nn.remat(module, **options) if network.remat else module


class DdpmBlock(nn.Module):
    """Two convolutions and a skip connection, conditioned on an embedding.

    Attributes:
        channels: of the output.
        groups: of the normalizations.
        resample: 'up' or 'down' by 2 before the first convolution, on both branches; None for no resampling.
        film: the embedding scales and shifts the output of the second norm; otherwise it is added before the norm.
        embedding_swish: apply a swish to the embedding.
        dropout: rate before the second convolution, in training.
    """

    channels: int
    groups: int
    dtype: jnp.dtype
    resample: str | None = None
    film: bool = False
    embedding_swish: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.swish(group_norm(x, self.groups, "norm_in"))
        if self.resample == "up":
            x = nearest_upsample(x)
        elif self.resample == "down":
            x, h = average_pool(x), average_pool(h)
        h = conv(self.channels, 3, self.dtype, name="conv_in", upsample=self.resample == "up")(h)
        embedding = nn.swish(embedding) if self.embedding_swish else embedding
        width = 2 * self.channels if self.film else self.channels
        condition = nn.Dense(width, name="embedding")(embedding)[:, None, None, :].astype(self.dtype)
        if self.film:
            scale, shift = jnp.split(condition, 2, axis=-1)
            h = group_norm(h, self.groups, "norm_out") * (1 + scale) + shift
        else:
            h = group_norm(h + condition, self.groups, "norm_out")
        h = nn.Dropout(self.dropout)(nn.swish(h), deterministic=not train)
        h = conv(self.channels, 3, self.dtype, zeros, "conv_out")(h)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, name="skip")(x)
        return x + h


class DdpmAttention(nn.Module):
    """Self-attention over all pixels with a residual connection; softmax in float32.

    The channels of the joint projection are ordered by head, then query, key and value.

    Attributes:
        qkv_bias: whether that projection has a bias.
    """

    groups: int
    heads: int
    dtype: jnp.dtype
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        qkv = nn.Dense(3 * c, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(
            group_norm(x, self.groups, "norm")
        )
        query, key, value = jnp.moveaxis(qkv.reshape(b, h * w, self.heads, 3, c // self.heads), 3, 0)
        attended = attend(query, key, value).reshape(b, h, w, c)
        return x + nn.Dense(c, dtype=self.dtype, kernel_init=zeros, name="out")(attended)
