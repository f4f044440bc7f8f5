"""The regression twin of fashion_4x.py: the same network and data, one pass (paper section 4).

sr3 train --config=configs/fashion_4x_regression.py --workdir=out/fashion_4x_regression

The weights of the highest held-out PSNR are kept as out/fashion_4x_regression/best.safetensors.
"""

from _baseline import regression
from fashion_4x import get_config as diffusion
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The twin's config as a regression."""
    return regression(diffusion())
