"""The paper's class-conditional cascade of ImageNet: 64 -> 256 (section 4.4).

sr3 train --config=configs/cascade_imagenet_256.py --workdir=out/cascade
sr3 cascade --stages out/cascade -n 16 --labels 207,388 --guidance 1.5 -o out/images

The first command trains the two stages in order; on a pod, train each by its own config, side by side.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The stages' configs, in order."""
    return ConfigDict({"stages": ("base_imagenet_64.py", "imagenet_64_256_blurred.py")})
