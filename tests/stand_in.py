"""A model without a network, for tests of the code around models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np


@dataclass
class StandIn:
    """Nearest-neighbor upscaling plus up to `noise` levels from each row's key; `before` is called with each batch."""

    scale: int = 2
    noise: int = 0
    name: str = "stand-in"
    before: Callable[[np.ndarray], None] = lambda images: None
    calls: list[tuple[tuple[int, ...], int | None, str | None]] = field(default_factory=list)

    def upscale(self, images, key, *, steps=None, solver=None):
        """uint8 [B,H,W,3], keys [B] -> uint8 [B,sH,sW,3]."""
        assert images.dtype == np.uint8
        assert key.shape == images.shape[:1]
        self.calls.append((images.shape, steps, solver))
        self.before(images)
        output = images.repeat(self.scale, axis=1).repeat(self.scale, axis=2).astype(np.int32)
        for row, data in zip(output, np.asarray(jax.random.key_data(key)), strict=True):
            row += np.random.default_rng(data).integers(0, self.noise + 1, row.shape, np.int32)
        return np.clip(output, 0, 255).astype(np.uint8)
