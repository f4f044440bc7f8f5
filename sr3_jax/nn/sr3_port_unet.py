"""The U-Net of the PyTorch port of SR3 by Janspiry (2021), with which many models have been trained.

https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement. Submodules are named after the tensors of
its files, so that `sr3 convert` can map one to the other: `downs_4_attn` is downs.4.attn. Shape legend: B batch,
H height, W width, C channels.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr3_jax.nn.blocks import conv, sinusoidal
from sr3_jax.nn.ddpm_blocks import DdpmAttention, DdpmBlock, maybe_remat, output_layers
from sr3_jax.types import Conditioning, Image, NoiseLevel


class Sr3PortUNet(nn.Module):
    """Predicts eps from a noisy image, its noise level and the condition.

    It differs from the paper's network (`unet.UNet`) by unscaled residual sums, resampling by convolutions between the
    levels, an input sqrt(gamma), and the low-res image before y_t.

    Attributes:
        channels, multipliers, num_blocks, attention_levels, dropout, remat, low_res, dtype, out_channels: as in
            `unet.UNet`.
        norm_groups: of all normalizations.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    attention_levels: tuple[int, ...] = (3,)
    dropout: float = 0.0
    norm_groups: int = 32
    remat: bool = False
    low_res: bool = True
    dtype: str = "float32"
    out_channels: int = 3
    # Of all networks, only the others have these options.
    num_classes = 0
    augment = False
    regression = False
    mid_attention = True
    head_channels = 0
    learned_variance = False

    @property
    def stride(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @nn.compact
    def __call__(self, y_t: Image, gamma: NoiseLevel, cond: Conditioning, train: bool = False) -> jax.Array:
        """Predict [B,H,W,C] float32, with the arguments of `UNet`."""
        dtype, last = jnp.dtype(self.dtype), len(self.multipliers) - 1
        embedding = self._embed(gamma)

        def block(x: jax.Array, channels: int, name: str, *, attention: bool) -> jax.Array:
            module = maybe_remat(DdpmBlock, self, static_argnums=(3,))(
                channels, self.norm_groups, dtype, dropout=self.dropout, name=f"{name}_res_block"
            )
            x = module(x, embedding, train)
            if not attention:
                return x
            attend = maybe_remat(DdpmAttention, self)
            return attend(self.norm_groups, 1, dtype, qkv_bias=False, name=f"{name}_attn")(x)

        x = jnp.concatenate([cond["upsampled"], y_t], axis=-1) if self.low_res else y_t
        x = conv(self.channels, 3, dtype, name="downs_0")(x.astype(dtype))
        skips = [x]
        for level, blocks in enumerate(self.num_blocks):
            width, attention = self.channels * self.multipliers[level], level in self.attention_levels
            for _ in range(blocks):
                x = block(x, width, f"downs_{len(skips)}", attention=attention)
                skips.append(x)
            if level < last:
                name = f"downs_{len(skips)}_conv"
                x = nn.Conv(width, (3, 3), strides=2, padding=1, dtype=dtype, name=name)(x)
                skips.append(x)
        x = block(x, x.shape[-1], "mid_0", attention=True)
        x = block(x, x.shape[-1], "mid_1", attention=False)
        index = 0
        for level in range(last, -1, -1):
            width, attention = self.channels * self.multipliers[level], level in self.attention_levels
            for _ in range(self.num_blocks[level] + 1):
                joined = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(joined, width, f"ups_{index}", attention=attention)
                index += 1
            if level > 0:
                x = conv(width, 3, dtype, name=f"ups_{index}_conv", upsample=True)(x)
                index += 1
        return output_layers(x, self.norm_groups, self.out_channels)

    def _embed(self, gamma: NoiseLevel) -> jax.Array:
        """The embedding [B,channels] of the noise level."""
        half = self.channels // 2
        features = sinusoidal(jnp.sqrt(gamma), self.channels, 1.0, 10_000.0 ** (1 / half - 1))
        features = jnp.roll(features, half, axis=1)  # sines first
        x = nn.Dense(4 * self.channels, name="noise_level_mlp_1")(features)
        return nn.Dense(self.channels, name="noise_level_mlp_3")(nn.swish(x))
