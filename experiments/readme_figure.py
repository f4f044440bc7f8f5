#!/usr/bin/env python
"""Write the figure at the top of README.md: two crops of the bundled test photographs at 4x.

    python experiments/readme_figure.py

Columns: low-res input, bicubic, the shipped model with its default sampler and seed 0, ground truth. The crops were
chosen because sharp edges and smooth surfaces are what the model does well; docs/models.md shows the worst image too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import sr3_jax
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_ops import degrade, to_uint8, to_unit, upsample

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "sr3_jax" / "data" / "photos" / "test"
OUTPUT = ROOT / "docs" / "images" / "readme.jpg"
SIDE = 224  # pixels of each crop
CROPS = {"kingfisher": (24, 176), "bamboo": (80, 96)}  # top and left of each crop, multiples of SCALE
SCALE = 4
COLUMNS = (
    f"low-res, {SIDE // SCALE}x{SIDE // SCALE}",
    "bicubic",
    "sr3_jax (photo_4x)",
    f"ground truth, {SIDE}x{SIDE}",
)


def row(model: sr3_jax.Model, photo: Path, top: int, left: int) -> list[np.ndarray]:
    """The cells of one photograph, uint8: the whole image is upscaled, then all are cropped to the same window."""
    ground_truth = np.asarray(Image.open(photo).convert("RGB"))
    height, width = (side // SCALE * SCALE for side in ground_truth.shape[:2])
    ground_truth = ground_truth[:height, :width]
    low_res = np.asarray(to_uint8(degrade(to_unit(ground_truth[None]), SCALE)))
    bicubic = np.asarray(to_uint8(upsample(to_unit(low_res), SCALE)))[0]
    output = model.upscale(low_res[0], seed=0)
    window = np.s_[top : top + SIDE, left : left + SIDE]
    small = np.s_[top // SCALE : (top + SIDE) // SCALE, left // SCALE : (left + SIDE) // SCALE]
    return [low_res[0][small], bicubic[window], output[window], ground_truth[window]]


def main() -> None:
    model = sr3_jax.load("photo_4x")
    rows = [row(model, PHOTOS / f"{name}.jpg", *corner) for name, corner in CROPS.items()]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(rows, column_titles=COLUMNS)).save(OUTPUT, quality=92, subsampling=0)
    print(f"Wrote {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
