"""The middle stage of the small cascade: Fashion-MNIST, padded to 32x32, at 16x16 from 8x8.

sr3 train --config=configs/fashion_8_16.py --workdir=out/fashion_8_16
"""

from fashion_16_32 import get_config as last
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The last stage's recipe on images of half the size."""
    config = last()
    config.data.shrink = 2
    config.stage.update({"name": "sr_16", "size": 16})
    return config
