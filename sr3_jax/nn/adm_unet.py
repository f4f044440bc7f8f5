"""The U-Net of ADM (Dhariwal and Nichol 2021), whose upsamplers 64 -> 256 and 128 -> 512 have published weights.

Submodules are named after the tensors of those files, so that `sr3 convert` can map one to the other:
`input_blocks_4_1` is input_blocks.4.1. Shape legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.diffusion import schedule
from sr3_jax.nn.blocks import conv, sinusoidal
from sr3_jax.nn.ddpm_blocks import DdpmAttention, DdpmBlock, maybe_remat, output_layers
from sr3_jax.types import Conditioning, Image, NoiseLevel

BETAS = (0.1, 20.0)  # T times the first and the last beta of its linear schedule of T steps


@functools.cache
def _levels(timesteps: int) -> np.ndarray:
    """[T] float32, gamma of the steps 0..T-1."""
    return schedule.linear(timesteps, BETAS[0] / timesteps, BETAS[1] / timesteps).gamma[1:]


def timestep(gamma: NoiseLevel, timesteps: int) -> jax.Array:
    """[B] gamma -> [B] float32, the step of the linear schedule with this gamma, in [0, T-1].

    Exact at the steps, and even in log-SNR between two of them.
    """
    levels = jnp.asarray(_levels(timesteps))
    above = jnp.clip(jnp.searchsorted(-levels, -gamma, side="right"), 1, timesteps - 1)
    # The three logarithms are computed in the same way: where gamma is a level, the quotient is 0 or 1.
    known = jnp.stack([levels[above - 1], gamma, levels[above]])
    start, value, end = jnp.log(known) - jnp.log1p(-known)
    return above - 1 + jnp.clip((start - value) / (start - end), 0.0, 1.0)


class AdmUNet(nn.Module):
    """Predicts eps (or y0), and perhaps its variance, from a noisy image, its noise level and the condition.

    It differs from `unet.UNet` in its layout 'biggan' by unscaled residual sums, by groups of any size, and by an input
    that is the step of a discrete schedule (`timestep`). Fields that are not listed are as in `unet.UNet`.

    Attributes:
        heads: number of attention heads where `head_channels` is 0.
        num_classes: number of labels, 0 for none; there is no label for "no label".
        timesteps: T of the schedule.
        learned_variance: predict 2C channels: the second half is 2v - 1 for the v of `diffusion.ancestral_learned`.
        norm_groups: of all normalizations.
    """

    channels: int = 192
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    num_blocks: tuple[int, ...] = (2, 2, 2, 2, 2, 2)
    attention_levels: tuple[int, ...] = (3, 4, 5)
    head_channels: int = 0
    heads: int = 4
    film: bool = True
    dropout: float = 0.0
    num_classes: int = 0
    timesteps: int = 1000
    learned_variance: bool = False
    norm_groups: int = 32
    remat: bool = False
    low_res: bool = True
    dtype: str = "float32"
    out_channels: int = 3
    # Of all networks, only `UNet` has these options.
    augment = False
    regression = False
    mid_attention = True

    @property
    def stride(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @nn.compact
    def __call__(self, y_t: Image, gamma: NoiseLevel, cond: Conditioning, train: bool = False) -> jax.Array:
        """Predict [B,H,W,C] float32 ([B,H,W,2C] with `learned_variance`), with the arguments of `UNet`."""
        dtype, last = jnp.dtype(self.dtype), len(self.multipliers) - 1
        embedding = self._embed(gamma, cond)

        def block(x: jax.Array, level: int, name: str, resample: str | None = None) -> jax.Array:
            module = maybe_remat(DdpmBlock, self, static_argnums=(3,))(
                self.channels * self.multipliers[level],
                self.norm_groups,
                dtype,
                resample,
                self.film,
                embedding_swish=True,
                dropout=self.dropout,
                name=name,
            )
            return module(x, embedding, train)

        def attend(x: jax.Array, name: str) -> jax.Array:
            heads = x.shape[-1] // self.head_channels if self.head_channels else self.heads
            return maybe_remat(DdpmAttention, self)(self.norm_groups, heads, dtype, name=name)(x)

        x = jnp.concatenate([y_t, cond["upsampled"]], axis=-1) if self.low_res else y_t
        x = conv(self.channels, 3, dtype, name="input_blocks_0_0")(x.astype(dtype))
        skips = [x]
        for level, blocks in enumerate(self.num_blocks):
            for _ in range(blocks):
                name = f"input_blocks_{len(skips)}"
                x = block(x, level, f"{name}_0")
                x = attend(x, f"{name}_1") if level in self.attention_levels else x
                skips.append(x)
            if level < last:
                x = block(x, level, f"input_blocks_{len(skips)}_0", "down")
                skips.append(x)
        x = block(x, last, "middle_block_0")
        x = block(attend(x, "middle_block_1"), last, "middle_block_2")
        count = len(skips)
        for level in range(last, -1, -1):
            attended = level in self.attention_levels
            for index in range(self.num_blocks[level] + 1):
                name = f"output_blocks_{count - len(skips)}"
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), level, f"{name}_0")
                x = attend(x, f"{name}_1") if attended else x
                if level > 0 and index == self.num_blocks[level]:
                    x = block(x, level, f"{name}_{1 + attended}", "up")
        return output_layers(x, self.norm_groups, (1 + self.learned_variance) * self.out_channels)

    def _embed(self, gamma: NoiseLevel, cond: Conditioning) -> jax.Array:
        """The embedding [B,4*channels] of step and label."""
        width, half = 4 * self.channels, self.channels // 2
        lowest = 10_000.0 ** (1 / half - 1)
        features = sinusoidal(timestep(gamma, self.timesteps), self.channels, 1.0, lowest)
        x = nn.Dense(width, name="time_embed_0")(features)
        x = nn.Dense(width, name="time_embed_2")(nn.swish(x))
        if not self.num_classes:
            return x
        if "label" not in cond:
            raise ValueError(f"num_classes={self.num_classes} needs cond['label']: give labels")
        return x + nn.Embed(self.num_classes, width, name="label_emb")(cond["label"])
