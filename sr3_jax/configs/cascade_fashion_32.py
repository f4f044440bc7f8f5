"""A small class-conditional cascade on Fashion-MNIST, 8 -> 16 -> 32.

sr3 train --config=cascade_fashion_32 --workdir=out/cascade
sr3 cascade --stages out/cascade -n 100 -o out/images

The first command trains the three stages in order. Images are padded from 28x28 to 32x32.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The presets of the stages, in order."""
    return ConfigDict({"stages": ("base_fashion_8", "fashion_8_16", "fashion_16_32")})
