"""A model without a network, for tests of the code around models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from sr3_jax.inference.tiling import Axis, Tiling, tile_image
from sr3_jax.sampling import Sampling


@dataclass
class StandIn:
    """Nearest-neighbor upscaling plus up to `noise` levels from each row's key; `before` is called with each batch."""

    scale: int = 2
    noise: int = 0
    name: str = "stand-in"
    label: int | None = None
    before: Callable[[np.ndarray], None] = lambda images: None
    on_step: Callable[[int, int, np.ndarray], object] = lambda step, steps, images: None
    calls: list[tuple[tuple[int, ...], int | None, str | None]] = field(default_factory=list)

    sampling: Sampling = field(default_factory=lambda: Sampling("dpmpp_2m", 10))
    most: int = 10**6  # side of an image that is not divided into tiles

    def tiling(self, height, width, *, tile=None):
        if max(height, width) <= (tile or self.most):
            return Tiling(Axis(height, (0,), (0, height)), Axis(width, (0,), (0, width)), 16)
        return tile_image(height, width, most=tile or self.most, stride=1, scale=self.scale, exact=10**6)

    def upscale_bands(self, image, seed, *, sampling, tile, batch_size, on_tiles):
        plan = self.tiling(*image.shape[:2], tile=tile)
        keys = jax.vmap(jax.random.key)(np.full([1], seed, np.uint32))
        output = self.upscale(
            np.stack([image] * batch_size), keys[np.zeros(batch_size, int)], sampling=sampling
        )[0]
        on_tiles(plan.count)
        yield from np.array_split(output, 3)

    def watched(self, on_step):
        self.on_step = on_step
        return self

    def upscale(self, images, key, *, sampling=None, tile=None):
        """uint8 [B,H,W,3], keys [B] -> uint8 [B,sH,sW,3]."""
        steps, solver = (None, None) if sampling is None else (sampling.steps, sampling.solver)
        assert images.dtype == np.uint8
        assert key.shape == images.shape[:1]
        self.calls.append((images.shape, steps, solver))
        self.on_step(1, 10, images)
        self.before(images)
        output = images.repeat(self.scale, axis=1).repeat(self.scale, axis=2).astype(np.int32)
        for row, data in zip(output, np.asarray(jax.random.key_data(key)), strict=True):
            row += np.random.default_rng(data).integers(0, self.noise + 1, row.shape, np.int32)
        return np.clip(output, 0, 255).astype(np.uint8)
