#!/usr/bin/env python
"""Write docs/images/degradations.jpg and docs/images/denoise.jpg from the bundled test photographs.

    python experiments/degradation_figures.py

The first shows low-res images of the presets of `config.data.degradation`, the second the effect of `--denoise T` on
images of the preset photo. Seeds are fixed; nothing is selected.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import sr3_jax
from sr3_jax.data.sources import open_source
from sr3_jax.degradations import PRESETS
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_ops import to_uint8, to_unit

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SCALE, SIDE, ROWS = 4, 320, 3
COLUMNS = ("clean", "photo", "photo", "photo", "wild", "wild", "wild")
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
MODEL, STRIP_SIDE = "photo_4x_robust", 224


def crops(side: int) -> np.ndarray:
    """The centers [ROWS,side,side,3] of the first bundled photographs that are large enough."""
    source = open_source("photos:test", min_side=side)
    images = [source[index]["image"] for index in range(ROWS)]
    corners = [((image.shape[0] - side) // 2, (image.shape[1] - side) // 2) for image in images]
    return np.stack(
        [
            image[top : top + side, left : left + side]
            for image, (top, left) in zip(images, corners, strict=True)
        ]
    )


def degraded(name: str, images: np.ndarray, *, seed: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), len(images))
    return np.asarray(to_uint8(PRESETS[name].apply(keys, to_unit(images), SCALE)))


def save(rows: list[list[np.ndarray]], titles: list[str], file: str) -> None:
    Image.fromarray(image_grid(rows, column_titles=titles)).save(IMAGES / file, quality=92, subsampling=0)
    print(f"Wrote docs/images/{file}")


def main() -> None:
    images = crops(SIDE)
    columns = [degraded(name, images, seed=number) for number, name in enumerate(COLUMNS)]
    # Enlarged, so that single pixels are visible.
    large = [np.repeat(np.repeat(column, 2, axis=1), 2, axis=2) for column in columns]
    save([[column[row] for column in large] for row in range(ROWS)], list(COLUMNS), "degradations.jpg")

    model = sr3_jax.load(MODEL)
    images = crops(STRIP_SIDE)
    low_res = degraded("photo", images, seed=1)
    outputs = [
        model.upscale(low_res, sampling=dataclasses.replace(model.sampling, augment=strength))
        for strength in STRENGTHS
    ]
    rows = [[low_res[row], *(output[row] for output in outputs), images[row]] for row in range(ROWS)]
    titles = ["low-res", *(f"--denoise {strength:g}" for strength in STRENGTHS), "ground truth"]
    save(rows, titles, "denoise.jpg")


if __name__ == "__main__":
    main()
