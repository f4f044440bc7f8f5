"""A PyTorch U-Net with the shape of the paper's presets, as a speed baseline.

Resampling residual blocks, skips from every block, one attention level: layout 'biggan' of `sr3_jax/nn/unet.py`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def groups(channels: int) -> int:
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)


class Block(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, embedding: int, dropout: float, resample: str | None = None
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups(inputs), inputs), nn.GroupNorm(groups(outputs), outputs)
        self.conv1, self.conv2 = (
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.embedding, self.dropout, self.resample = (
            nn.Linear(embedding, outputs),
            nn.Dropout(dropout),
            resample,
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, embedding):
        h = F.silu(self.norm1(x))
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2), F.interpolate(h, scale_factor=2)
        elif self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h = self.conv1(h) + self.embedding(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.skip(x) + h) / math.sqrt(2)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(groups(channels), channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        query, key, value = self.qkv(self.norm(x)).reshape(b, 3, 1, c, h * w).transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return (x + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))) / math.sqrt(2)


class UNet(nn.Module):
    """(y_t [B,3,H,W], upsampled [B,3,H,W], gamma [B]) -> [B,3,H,W]."""

    def __init__(self, channels, multipliers, num_blocks, attention_levels, dropout):
        super().__init__()
        width, last = 4 * channels, len(multipliers) - 1
        self.channels = channels
        self.noise = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.input = nn.Conv2d(6, channels, 3, padding=1)
        self.down, self.up, skips, x = nn.ModuleList(), nn.ModuleList(), [channels], channels

        def stage(inputs, outputs, level, resample=None):
            parts = [Block(inputs, outputs, width, dropout, resample)]
            attends = resample is None and level in attention_levels
            return nn.ModuleList(parts + ([Attention(outputs)] if attends else []))

        for level, blocks in enumerate(num_blocks):
            for _ in range(blocks):
                self.down.append(stage(x, x := channels * multipliers[level], level))
                skips.append(x)
            if level < last:
                self.down.append(stage(x, x, level, "down"))
                skips.append(x)
        middle = [Block(x, x, width, dropout), Attention(x), Block(x, x, width, dropout)]
        self.middle = nn.ModuleList(middle)
        for level in range(last, -1, -1):
            for _ in range(num_blocks[level] + 1):
                self.up.append(stage(x + skips.pop(), x := channels * multipliers[level], level))
            if level > 0:
                self.up.append(stage(x, x, level, "up"))
        self.norm, self.output = nn.GroupNorm(groups(x), x), nn.Conv2d(x, 3, 3, padding=1)

    def forward(self, y_t, upsampled, gamma):
        log_snr = torch.logit(gamma.float(), eps=1e-7)[:, None]
        frequencies = torch.logspace(-1, math.log10(20), self.channels // 2, device=y_t.device)
        angles = log_snr * frequencies
        embedding = self.noise(torch.cat([angles.cos(), angles.sin()], 1))
        x = self.input(torch.cat([y_t, upsampled], 1))
        skips = [x]
        for stage in self.down:
            x = run(stage, x, embedding)
            skips.append(x)
        for part in self.middle:
            x = part(x) if isinstance(part, Attention) else part(x, embedding)
        for stage in self.up:
            if stage[0].resample is None:
                x = torch.cat([x, skips.pop()], 1)
            x = run(stage, x, embedding)
        return self.output(F.silu(self.norm(x)))


def run(stage, x, embedding):
    x = stage[0](x, embedding)
    return stage[1](x) if len(stage) > 1 else x
