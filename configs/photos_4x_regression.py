"""Photographs at 4x, the regression baseline: the network of `photos_4x.py`, the squared error, one pass.

sr3 train --config=configs/photos_4x_regression.py --workdir=out/photos_4x_regression --config.data.source=folder:PHOTOS

The weights of the highest held-out PSNR are kept as out/photos_4x_regression/best.safetensors.
"""

from _baseline import regression
from ml_collections import ConfigDict
from photos_4x import get_config as diffusion


def get_config() -> ConfigDict:
    """The twin's config as a regression."""
    return regression(diffusion())
