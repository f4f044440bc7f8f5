"""ORL faces 11x14 -> 88x112: the factor of the paper's faces, 8x.

sr3 train --config=orl_8x --workdir=out/orl_8x
"""

from ml_collections import ConfigDict

from sr3_jax.configs import orl_4x

PARAMETERS = orl_4x.PARAMETERS


def get_config() -> ConfigDict:
    """The recipe of `orl_4x` at 8x."""
    config = orl_4x.get_config()
    config.data.scale = 8
    config.diffusion.residual_scale = 6.0
    return config
