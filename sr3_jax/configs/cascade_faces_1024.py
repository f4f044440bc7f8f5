"""The paper's face cascade, 64 -> 256 -> 1024 (section 4.3).

sr3 train --config=cascade_faces_1024 --workdir=out/cascade
sr3 cascade --stages out/cascade -n 16 -o out/images

The first command trains the three stages in order. On pods, train the stages at the same time with their own configs.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The presets of the stages, in order."""
    return ConfigDict({"stages": ("base_faces_64", "faces_64_256", "faces_256_1024")})
