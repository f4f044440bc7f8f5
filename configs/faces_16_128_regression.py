"""Faces 16x16 -> 128x128, the regression baseline: the network of `faces_16_128.py`, the squared error, one pass.

sr3 train --config=configs/faces_16_128_regression.py --workdir=out/faces_16_128_regression

The weights of the highest held-out PSNR are kept as out/faces_16_128_regression/best.safetensors.
"""

from _baseline import regression
from faces_16_128 import get_config as diffusion
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The twin's config as a regression."""
    config = regression(diffusion())
    config.update({"optim": {"learning_rate": 1e-5}})  # paper section 3
    return config
