"""The paper's cascade of faces: 64 -> 256 -> 1024 (section 4.4).

sr3 train --config=configs/cascade_faces_1024.py --workdir=out/cascade
sr3 cascade --stages out/cascade -n 16 -o out/images

The first command trains the three stages in order; on a pod, train each by its own config, side by side.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The stages' configs, in order."""
    return ConfigDict({"stages": ("base_faces_64.py", "faces_64_256.py", "faces_256_1024.py")})
