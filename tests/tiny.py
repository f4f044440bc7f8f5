"""Images, a config and weights for training runs that take a second or two on a CPU."""

from __future__ import annotations

import copy
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image as PillowImage

CROP, SCALE = 16, 4

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "channels": 4,
        "multipliers": (1,),
        "num_blocks": (1,),
        "patch": 2,
        "layout": "efficient",
        "norm": "pixel",
        "mid_attention": False,
    },
    "diffusion": {
        "space": "residual",
        "residual_scale": 4.0,
        "prediction": "v",
        "norm": "l2",
        "num_steps": 100,
    },
    "data": {"crop": CROP, "scale": SCALE, "threads": 1, "cache_mb": 16},
    "optim": {"learning_rate": 1e-3, "warmup_steps": 2, "ema_decay": 0.9},
    "train": {"num_steps": 4, "batch_size": 8, "log_every": 2},
    "eval": {"every": 1000, "num_images": 8},
    "sampling": {"steps": 2, "solver": "ddim"},
    "checkpoint": {"every": 1000, "keep": 10},
}


def images(folder: Path, *, count: int = 8, side: int = 24, seed: int = 0) -> Path:
    """Write `count` different smooth PNGs of side x side pixels to a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        coarse = PillowImage.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((side, side), PillowImage.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def config(folder: Path | str = "images", **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tiny config for the images of a folder, with fields replaced by section: config(folder, train={...})."""
    merged = copy.deepcopy(CONFIG)
    merged["data"] |= {"source": f"folder:{folder}", "eval_source": f"folder:{folder}"}
    for section, fields in sections.items():
        merged[section] = merged.get(section, {}) | fields
    return merged


def perturbed(params: Any, *, seed: int = 0, size: float = 0.1) -> Any:
    """The weights plus normal noise, so that zero-initialized layers have an effect."""
    leaves, tree = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [leaf + size * generator.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    )


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Skip the slow passes of XLA, for tests that spend more time on compilation than on computation."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@contextmanager
def small_disk(limit: int):
    """A disk that is full for every file above `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
