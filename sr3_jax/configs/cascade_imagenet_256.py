"""The paper's class-conditional ImageNet cascade, 64 -> 256 (section 4.3).

sr3 train --config=cascade_imagenet_256 --workdir=out/cascade
sr3 cascade --stages out/cascade -n 16 --labels 207,388 --guidance 1.5 -o out/images

The first command trains the two stages in order. On pods, train the stages at the same time with their own configs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The presets of the stages, in order."""
    return ConfigDict({"stages": ("base_imagenet_64", "imagenet_64_256_blurred")})
