"""The U-Net of SR3 (paper section 2.4) and a faster variant.

Shape legend: B batch, H height, W width, C channels. Level i has 1 / (patch * 2^i) of the image's resolution.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr3_jax.nn.blocks import (
    Attention,
    Norm,
    ResidualBlock,
    conv,
    depth_to_space,
    log_snr_features,
    sinusoidal,
    space_to_depth,
    zeros,
)
from sr3_jax.types import Conditioning, Image, Key, NoiseLevel, Params

if TYPE_CHECKING:
    from sr3_jax.nn.adm_unet import AdmUNet
    from sr3_jax.nn.sr3_port_unet import Sr3PortUNet

Network: TypeAlias = "UNet | AdmUNet | Sr3PortUNet"


def _is_matmul_or_conv(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive in (jax.lax.conv_general_dilated_p, jax.lax.dot_general_p)


def apply_unet(
    network: Network,
    params: Params,
    y_t: Image,
    gamma: NoiseLevel,
    cond: Conditioning,
    *,
    train: bool = False,
    dropout_key: Key | None = None,
) -> jax.Array:
    """The prediction of a network with given weights; with the first two arguments bound it is a `Denoiser`."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return cast(jax.Array, network.apply({"params": params}, y_t, gamma, cond, train=train, rngs=rngs))


class UNet(nn.Module):
    """Predicts eps, v or y0 from a noisy image, its noise level and the condition.

    Attributes:
        channels: width of level 0.
        multipliers: level i has `channels * multipliers[i]` channels.
        num_blocks: number of residual blocks per level on the downsampling path.
        attention_levels: levels with self-attention after each block.
        mid_attention: self-attention between the two blocks at the lowest resolution.
        head_channels: channels per attention head; 0 for a single head.
        layout: 'biggan', the paper's: resampling inside residual blocks, a skip connection from every block, and one
            more block per level on the upsampling path. 'efficient', after Imagen's Efficient U-Net: strided
            convolutions between levels and one skip connection per level; put most blocks at the low resolutions.
        patch: space-to-depth factor of input and output, 1, 2 or 4; a factor of 4 makes level 0 16 times cheaper.
        norm: 'group' or 'pixel'; see `Norm`.
        film: the embedding scales and shifts activations instead of being added.
        dropout: rate in the residual blocks.
        num_classes: number of labels, 0 for none; label `num_classes` means "no label".
        augment: take cond['augment'] as an input, the strength [B] in [0,1] of the conditioning augmentation.
        remat: recompute the activations of each block in the backward pass to save memory.
        remat_keeps: what `remat` stores from each block: 'nothing', or the outputs of its 'convs' and matrix products,
            which takes more memory but recomputes none of them.
        regression: the paper's regression baseline (section 4): the input is the low-res image only, without y_t and
            gamma.
        low_res: whether the network is conditioned on a low-res image; False for the base stage of a cascade.
        stem_channels: width of the input convolution; 0 for `channels`. With `patch` above 1 a stem narrower than its
            input, 2 * 3 * patch^2 values per position, loses detail of y_t before the first block.
        output_skip: 0, or the initial value of a learned skip connection from y_t to the output, for y0 prediction.
            The network then predicts mean m and standard deviation d of y0 per pixel, and returns the posterior mean
            of y0 given y_t = a y0 + s eps: c y_t / a + (1 - c) m with c = d^2 / (d^2 + (s/a)^2). At low noise y_t
            itself is the best estimate, which a network can hardly copy (Karras et al. 2022, section 5, with d
            constant). d starts at `output_skip`.
        dtype: of activations, 'float32' or 'bfloat16'; weights, norms, softmax and the last convolution are float32.
        out_channels: channels of the prediction.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_blocks: tuple[int, ...] = (3, 3, 3, 3, 3)
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    head_channels: int = 0
    layout: str = "biggan"
    patch: int = 1
    norm: str = "group"
    film: bool = False
    dropout: float = 0.0
    num_classes: int = 0
    augment: bool = False
    remat: bool = False
    remat_keeps: str = "nothing"
    regression: bool = False
    low_res: bool = True
    stem_channels: int = 0
    output_skip: float = 0.0
    dtype: str = "float32"
    out_channels: int = 3
    learned_variance = False  # of all networks, only `AdmUNet` can predict it

    @property
    def stride(self) -> int:
        """Height and width of the input must be multiples of this."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @nn.compact
    def __call__(self, y_t: Image, gamma: NoiseLevel, cond: Conditioning, train: bool = False) -> jax.Array:
        """Predict [B,H,W,C] float32 from y_t [B,H,W,C], gamma [B] and cond.

        With `low_res`, cond['upsampled'] [B,H,W,C] is concatenated to y_t along the channels (paper section 2.4).

        Args:
            train: apply dropout, with the 'dropout' key of Flax.

        Raises:
            ValueError: H or W is not a multiple of `stride`; the label of a class-conditional network is missing.
        """
        if y_t.shape[1] % self.stride or y_t.shape[2] % self.stride:
            raise ValueError(
                f"image height and width must be multiples of {self.stride}, got {y_t.shape[1]}x{y_t.shape[2]}: "
                "pad the image or use fewer levels"
            )
        dtype = jnp.dtype(self.dtype)
        if self.regression:
            inputs, gamma = [cond["upsampled"]], jnp.ones_like(gamma)
        else:
            inputs = [y_t, cond["upsampled"]] if self.low_res else [y_t]
        embedding = self._embed(gamma, cond)
        x = jnp.concatenate([space_to_depth(part, self.patch) for part in inputs], axis=-1)
        x = conv(self.stem_channels or self.channels, 3, dtype, name="input")(x.astype(dtype))

        body = self._biggan if self.layout == "biggan" else self._efficient
        x = body(x, embedding, train)

        x = nn.swish(Norm(self.norm, name="output_norm")(x.astype(jnp.float32)))
        maps = 2 if self.output_skip else 1
        channels, highest = maps * self.out_channels * self.patch**2, jax.lax.Precision.HIGHEST
        x = conv(channels, 3, jnp.float32, zeros, name="output", precision=highest)(x)
        if not self.output_skip:
            return depth_to_space(x, self.patch)
        mean, log_deviation = (depth_to_space(part, self.patch) for part in jnp.split(x, 2, axis=-1))
        gamma = gamma[:, None, None, None]
        log_snr = jnp.log(gamma) - jnp.log1p(-gamma)  # ln(a^2 / s^2), +inf at gamma = 1
        c = nn.sigmoid(2.0 * (log_deviation + math.log(self.output_skip)) + log_snr)
        return c * y_t / jnp.sqrt(gamma) + (1.0 - c) * mean

    def _embed(self, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        """The embedding [B,4*channels] of noise level, label and augmentation strength."""
        width = 4 * self.channels
        x = nn.Dense(width, name="noise_in")(log_snr_features(gamma, self.channels))
        x = nn.Dense(width, name="noise_out")(nn.swish(x))
        if self.num_classes:
            if "label" not in cond:
                raise ValueError(
                    f"num_classes={self.num_classes} needs cond['label']: give labels, or {self.num_classes} for "
                    "'no label'"
                )
            x = x + nn.Embed(self.num_classes + 1, width, name="label")(cond["label"])
        if self.augment:
            strength = cond.get("augment", jnp.zeros_like(gamma))
            y = nn.Dense(width, name="augment_in")(sinusoidal(strength, self.channels, 0.5, 200.0))
            # Zero at first, so that training can start from a model without this input.
            zeros = nn.initializers.zeros
            x = x + nn.Dense(width, kernel_init=zeros, name="augment_out")(nn.swish(y))
        return x

    def _block(self, channels: int, name: str, resample: str | None = None) -> Any:
        module = self._maybe_remat(ResidualBlock, static_argnums=(3,))
        return module(
            channels, self.norm, jnp.dtype(self.dtype), resample, self.film, self.dropout, name=name
        )

    def _maybe_remat(self, module: Any, **options: Any) -> Any:
        policy = _is_matmul_or_conv if self.remat_keeps == "convs" else None
        return nn.remat(module, policy=policy, **options) if self.remat else module

    def _attention(self, name: str) -> Any:
        module = self._maybe_remat(Attention)
        return module(self.norm, jnp.dtype(self.dtype), self.head_channels, name=name)

    def _stage(self, x: jax.Array, embedding: jax.Array, train: bool, level: int, name: str) -> jax.Array:
        """One residual block of a level, followed by attention if the level has it."""
        x = self._block(self.channels * self.multipliers[level], name)(x, embedding, train)
        return self._attention(f"{name}_attention")(x) if level in self.attention_levels else x

    def _mid(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        x = self._block(x.shape[-1], "mid_0")(x, embedding, train)
        if self.mid_attention:
            x = self._attention("mid_attention")(x)
        return self._block(x.shape[-1], "mid_1")(x, embedding, train)

    def _biggan(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        last = len(self.multipliers) - 1
        skips = [x]
        for level, blocks in enumerate(self.num_blocks):
            for index in range(blocks):
                x = self._stage(x, embedding, train, level, f"down_{level}_{index}")
                skips.append(x)
            if level < last:
                x = self._block(x.shape[-1], f"down_{level}", "down")(x, embedding, train)
                skips.append(x)
        x = self._mid(x, embedding, train)
        for level in range(last, -1, -1):
            for index in range(self.num_blocks[level] + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._stage(x, embedding, train, level, f"up_{level}_{index}")
            if level > 0:
                x = self._block(x.shape[-1], f"up_{level}", "up")(x, embedding, train)
        return x

    def _efficient(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        skips = []
        for level, blocks in enumerate(self.num_blocks):
            if level > 0:
                width = self.channels * self.multipliers[level]
                x = conv(width, 1, dtype, name=f"down_{level}")(space_to_depth(x, 2))
            for index in range(blocks):
                x = self._stage(x, embedding, train, level, f"down_{level}_{index}")
            skips.append(x)
        x = self._mid(x, embedding, train)
        for level in range(len(self.multipliers) - 1, -1, -1):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            for index in range(self.num_blocks[level]):
                x = self._stage(x, embedding, train, level, f"up_{level}_{index}")
            if level > 0:
                width = self.channels * self.multipliers[level - 1]
                x = depth_to_space(conv(4 * width, 1, dtype, name=f"up_{level}")(x), 2)
        return x
