"""Downscales an image by bicubic interpolation, as training does: the input of launch/quickstart.sh.

python launch/downscale.py IMAGE OUT FACTOR
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image
from sr3_jax.image_ops import degrade, to_uint8, to_unit


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # too little work for a GPU
    source, target, factor = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    rgb = read_rgb(Path(source))
    height, width = (side // factor * factor for side in rgb.shape[:2])
    small = to_uint8(degrade(to_unit(rgb[None, :height, :width]), factor))[0]
    write_image(target, DecodedImage(jax.device_get(small)))
    print(f"{target}: {source}, {width}x{height} pixels, downscaled {factor}x")


if __name__ == "__main__":
    main()
