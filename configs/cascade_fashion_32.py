"""The small cascade: class-conditional Fashion-MNIST, padded to 32x32, as 8 -> 16 -> 32.

sr3 train --config=configs/cascade_fashion_32.py --workdir=out/cascade
sr3 cascade --stages out/cascade -n 100 -o out/images

The first command trains the three stages in order.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The stages' configs, in order."""
    return ConfigDict({"stages": ("base_fashion_8.py", "fashion_8_16.py", "fashion_16_32.py")})
