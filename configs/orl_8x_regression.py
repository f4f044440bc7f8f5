"""The regression twin of orl_8x.py: the same network and data, one pass (paper section 4).

sr3 train --config=configs/orl_8x_regression.py --workdir=out/orl_8x_regression

The weights of the highest held-out PSNR are kept as out/orl_8x_regression/best.safetensors.
"""

from _baseline import regression
from ml_collections import ConfigDict
from orl_8x import get_config as diffusion


def get_config() -> ConfigDict:
    """The twin's config as a regression."""
    return regression(diffusion())
