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
LAYOUT = ("NHWC", "HWIO", "NHWC")  # of the input, kernel and output of a convolution
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


def upsampled_conv(
    x: jax.Array, kernel: jax.Array, *, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """A 3x3 convolution, zero-padded, of `nearest_upsample(x)`: [B,H,W,C], [3,3,C,D] -> [B,2H,2W,D].

    An output pixel sees only 2x2 pixels of x: where two taps of the kernel fall on the same pixel, they are added
    beforehand, in the dtype of the kernel. Each of the four positions in a 2x2 block has a convolution of its own, of
    4 in place of 9 products.
    """
    b, h, w, _c = x.shape

    def halves(kernel: jax.Array) -> list[jax.Array]:
        """Along the first axis: taps of the even outputs (pixels i-1 and i), then of the odd ones (i and i+1)."""
        return [
            jnp.stack([kernel[0], kernel[1] + kernel[2]]),
            jnp.stack([kernel[0] + kernel[1], kernel[2]]),
        ]

    rows = []
    for row, row_kernel in enumerate(halves(kernel)):
        row_of_blocks = [
            jax.lax.conv_general_dilated(
                x,
                jnp.swapaxes(taps, 0, 1).astype(x.dtype),
                (1, 1),
                ((1 - row, row), (1 - column, column)),
                dimension_numbers=LAYOUT,
                precision=precision,
            )
            for column, taps in enumerate(halves(jnp.swapaxes(row_kernel, 0, 1)))
        ]
        rows.append(jnp.stack(row_of_blocks, axis=3))
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, kernel.shape[-1])


class Conv(nn.Module):
    """A convolution with stride 1, 'SAME' padding and float32 weights, computed in `dtype`.

    One of 1x1 is a matrix product: on a CPU, the gradient of a convolution takes longer.

    Attributes:
        channels: of the output.
        kernel: 1 or 3, its height and width.
        precision: even in float32, without it a TPU multiplies in bfloat16 and an NVIDIA GPU in TF32.
        upsample: first double height and width by `nearest_upsample`; for a 3x3 kernel.
    """

    channels: int
    kernel: int
    dtype: jnp.dtype
    kernel_init: Callable
    precision: jax.lax.Precision | None = None
    upsample: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        weights = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.channels,), jnp.float32).astype(self.dtype)
        x, kernel = x.astype(self.dtype), weights.astype(self.dtype)
        if self.upsample:
            y = upsampled_conv(x, weights, precision=self.precision)
        elif self.kernel == 1:
            flat = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=self.precision)
            y = flat.reshape(*x.shape[:-1], self.channels)
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, precision=self.precision
            )
        return y + bias[None, None, None]


class GroupNorm(nn.Module):
    """Group normalization (Wu and He 2018), computed in float32; the dtype of x.

    Both moments are first averaged over the pixels of each channel, a reduction that all backends vectorize, and only
    then over the channels of a group. Matrix products go from channels to groups and back: XLA would fuse a repetition,
    also that in the gradient of a mean, into the loop over all pixels, which a CPU then runs without vector
    instructions.
    """

    groups: int
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", zeros, (channels,), jnp.float32)
        size, highest = channels // self.groups, jax.lax.Precision.HIGHEST
        members = np.repeat(np.eye(self.groups, dtype=np.float32), size, axis=1)

        def over_group(moment: jax.Array) -> jax.Array:
            """[B,C] -> [B,groups]: the mean."""
            return jnp.dot(moment, members.T / size, precision=highest)

        def to_channels(value: jax.Array) -> jax.Array:
            """[B,groups] -> [B,1,1,C]."""
            return jnp.dot(value, members, precision=highest)[:, None, None, :]

        wide = x.astype(jnp.float32)
        mean, square = over_group(wide.mean((1, 2))), over_group((wide * wide).mean((1, 2)))
        inverse = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.epsilon)
        factor = to_channels(inverse) * scale[None, None, None]
        return ((wide - to_channels(mean)) * factor + bias[None, None, None]).astype(x.dtype)


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
        return GroupNorm(groups)(x)


def conv(
    channels: int,
    kernel: int,
    dtype: jnp.dtype,
    init: Callable | None = None,
    name: str | None = None,
    precision: jax.lax.Precision | None = None,
    upsample: bool = False,
) -> Conv:
    """A `Conv`, initialized by `lecun_normal` unless `init` is given."""
    return Conv(
        channels, kernel, dtype, init or nn.initializers.lecun_normal(), precision, upsample, name=name
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
        if self.resample == "up":
            x = nearest_upsample(x)
        elif self.resample == "down":
            x, h = average_pool(x), average_pool(h)
        h = conv(self.channels, 3, self.dtype, upsample=self.resample == "up")(h)
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


def has_fused_attention() -> bool:
    """Whether cuDNN's attention runs on the default backend: an NVIDIA GPU from Ampere on."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version
    return is_nvidia and int(device.compute_capability.split(".")[0]) >= 8


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[B,N,heads,C] each -> [B,N,heads,C]: attention over N positions, softmax in float32.

    cuDNN's kernel, which does not store the N x N weights, takes half precision and heads of up to 128 channels in
    multiples of 8. Exported programs, whose batch size is symbolic, run elsewhere.
    """
    batch, _, _, channels = query.shape
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and channels <= 128 and channels % 8 == 0
    fused = fits and isinstance(batch, int) and has_fused_attention()
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if fused else None)


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
        attended = attend(query, key, value).reshape(b, h, w, c)
        out = nn.Dense(c, dtype=self.dtype, kernel_init=zeros, name="out")(attended)
        return (x + out) * RESIDUAL_SCALE
