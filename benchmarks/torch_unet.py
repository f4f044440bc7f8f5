"""PyTorch networks with the layers and parameters of `sr3_jax.nn.unet.UNet` and `sr3_jax.nn.adm_unet.AdmUNet`.

They are what a PyTorch user would write with its own layers, as a baseline of speed; the order of channels within a
layer may differ. Activations are [B,C,H,W], to be used with `channels_last`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Over the channels of each pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6).permute(0, 3, 1, 2)


def norm(network: Any, channels: int) -> nn.Module:
    if getattr(network, "norm", "group") == "pixel":
        return RMSNorm(channels)
    groups = getattr(network, "norm_groups", 0)
    largest = max(1, min(32, channels // 4))
    return nn.GroupNorm(groups or next(n for n in range(largest, 0, -1) if channels % n == 0), channels)


def residual_scale(network: Any) -> float:
    """ADM's sums are not scaled."""
    return 1.0 if hasattr(network, "norm_groups") else 1.0 / math.sqrt(2.0)


class Block(nn.Module):
    def __init__(self, network: Any, inputs: int, outputs: int, resample: str | None = None):
        super().__init__()
        self.resample, self.film, self.scale = resample, network.film, residual_scale(network)
        self.norm1, self.norm2 = norm(network, inputs), norm(network, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embedding = nn.Linear(4 * network.channels, (1 + network.film) * outputs)
        self.dropout = nn.Dropout(network.dropout)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, embedding):
        h = F.silu(self.norm1(x))
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2), F.interpolate(h, scale_factor=2)
        elif self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        h, condition = self.conv1(h), self.embedding(F.silu(embedding))[:, :, None, None]
        if self.film:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        h = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return h if self.scale == 1 else h * self.scale


class Attention(nn.Module):
    def __init__(self, network: Any, channels: int):
        super().__init__()
        head_channels = network.head_channels
        self.heads = channels // head_channels if head_channels else getattr(network, "heads", 1)
        self.scale = residual_scale(network)
        self.norm, self.qkv = norm(network, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        query, key, value = (
            self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w).transpose(-1, -2).unbind(1)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return (x + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))) * self.scale


class Embedding(nn.Module):
    """[B,4*channels] of noise level, label and augmentation strength."""

    def __init__(self, network: Any):
        super().__init__()
        channels, width, adm = network.channels, 4 * network.channels, hasattr(network, "norm_groups")
        self.channels = channels

        def mlp() -> nn.Sequential:
            return nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

        self.noise = mlp()
        self.label = nn.Embedding(network.num_classes + (not adm), width) if network.num_classes else None
        self.augment = mlp() if network.augment else None

    def forward(self, gamma, label):
        log_snr = torch.logit(gamma.float(), eps=1e-7)[:, None]
        angles = log_snr * torch.logspace(-1, math.log10(20), self.channels // 2, device=gamma.device)
        features = torch.cat([angles.cos(), angles.sin()], 1)
        x = self.noise(features)
        if self.label is not None:
            x = x + self.label(label)
        return x if self.augment is None else x + self.augment(features)


class UNet(nn.Module):
    """(y_t [B,3,H,W], gamma [B], upsampled [B,3,H,W] or None, label [B] or None) -> the prediction, [B,3,H,W] float32.

    Args:
        network: `UNet` or `AdmUNet` of sr3_jax, whose fields are read.
    """

    def __init__(self, network: Any):
        super().__init__()
        self.efficient = getattr(network, "layout", "biggan") == "efficient"
        self.patch, self.skip = getattr(network, "patch", 1), getattr(network, "output_skip", 0.0)
        self.embedding = Embedding(network)
        widths = [network.channels * multiplier for multiplier in network.multipliers]
        x = getattr(network, "stem_channels", 0) or network.channels
        self.input = nn.Conv2d((3 + 3 * network.low_res) * self.patch**2, x, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, last = ([] if self.efficient else [x]), len(widths) - 1

        def stage(inputs: int, level: int) -> nn.ModuleList:
            attends = level in network.attention_levels
            parts: list[nn.Module] = [Block(network, inputs, widths[level])]
            return nn.ModuleList(parts + ([Attention(network, widths[level])] if attends else []))

        # Each entry of `down` and `up` is a pair: what resamples before it or after it, and its blocks.
        for level, blocks in enumerate(network.num_blocks):
            if self.efficient and level:
                self.down.append(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * x, x := widths[level], 1)))
            for _ in range(blocks):
                self.down.append(stage(x, level))
                x = widths[level]
                skips += [] if self.efficient else [x]
            if self.efficient:
                skips.append(x)
            elif level < last:
                self.down.append(nn.ModuleList([Block(network, x, x, "down")]))
                skips.append(x)
        self.middle = nn.ModuleList([Block(network, x, x), Block(network, x, x)])
        self.middle_attention = Attention(network, x) if network.mid_attention else None
        for level in range(last, -1, -1):
            for index in range(network.num_blocks[level] + (not self.efficient)):
                joined = index == 0 or not self.efficient
                self.up.append(stage(x + (skips.pop() if joined else 0), level))
                x = widths[level]
            if level and self.efficient:
                x = widths[level - 1]
                self.up.append(nn.Sequential(nn.Conv2d(widths[level], 4 * x, 1), nn.PixelShuffle(2)))
            elif level:
                self.up.append(nn.ModuleList([Block(network, x, x, "up")]))
        self.norm = norm(network, x)
        maps = (2 if self.skip else 1) * 3 * (2 if network.learned_variance else 1)
        self.output = nn.Conv2d(x, maps * self.patch**2, 3, padding=1)

    def forward(self, y_t, gamma, upsampled=None, label=None):
        embedding = self.embedding(gamma, label)
        x = y_t if upsampled is None else torch.cat([y_t, upsampled], 1)
        x = self.input(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [] if self.efficient else [x]
        for part in self.down:
            if self.efficient and isinstance(part, nn.Sequential):
                skips.append(x)
            x = run(part, x, embedding)
            if not self.efficient:
                skips.append(x)
        if self.efficient:
            skips.append(x)
        x = self.middle[0](x, embedding)
        x = x if self.middle_attention is None else self.middle_attention(x)
        x = self.middle[1](x, embedding)
        first = True  # of its level
        for part in self.up:
            resamples = isinstance(part, nn.Sequential) or part[0].resample is not None
            if not resamples and (first or not self.efficient):
                x = torch.cat([x, skips.pop()], 1)
            x, first = run(part, x, embedding), resamples
        x = self.output(F.silu(self.norm(x)))
        x = (F.pixel_shuffle(x, self.patch) if self.patch > 1 else x).float()
        if not self.skip:
            return x
        mean, log_deviation = x.chunk(2, dim=1)
        gamma = gamma[:, None, None, None]
        c = torch.sigmoid(2 * (log_deviation + math.log(self.skip)) + torch.logit(gamma, eps=1e-7))
        return c * y_t / gamma.sqrt() + (1 - c) * mean


def run(part, x, embedding):
    if isinstance(part, nn.Sequential):
        return part(x)
    x = part[0](x, embedding)
    return part[1](x) if len(part) > 1 else x
