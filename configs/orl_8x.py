"""The ORL faces at 8x, 11x14 to 88x112: the factor of the paper's faces.

sr3 train --config=configs/orl_8x.py --workdir=out/orl_8x
"""

from ml_collections import ConfigDict
from orl_4x import get_config as at_4x


def get_config() -> ConfigDict:
    """The recipe for 4x at 8x."""
    config = at_4x()
    config.data.scale = 8
    config.diffusion.residual_scale = 6.0
    return config
