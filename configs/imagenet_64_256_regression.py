"""ImageNet 64x64 -> 256x256, the regression baseline: the network of `imagenet_64_256.py`, the squared error, one pass.

sr3 train --config=configs/imagenet_64_256_regression.py --workdir=out/imagenet_64_256_regression

The weights of the highest held-out PSNR are kept as out/imagenet_64_256_regression/best.safetensors.
"""

from _baseline import regression
from imagenet_64_256 import get_config as diffusion
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The twin's config as a regression."""
    config = regression(diffusion())
    config.update({"optim": {"learning_rate": 1e-5}})  # paper section 3
    return config
