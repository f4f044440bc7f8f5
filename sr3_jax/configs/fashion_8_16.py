"""Fashion-MNIST 8x8 -> 16x16 with noise on the low-res image in training: the middle stage of the small cascade.

sr3 train --config=fashion_8_16 --workdir=out/fashion_8_16
"""

from ml_collections import ConfigDict

from sr3_jax.configs import fashion_16_32

PARAMETERS = fashion_16_32.PARAMETERS


def get_config() -> ConfigDict:
    """The recipe of `fashion_16_32` on images of half the size."""
    config = fashion_16_32.get_config()
    config.data.shrink = 2
    config.stage.update(name="sr_16", size=16)
    return config
