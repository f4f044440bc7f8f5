"""Photographs at 4x, small, the regression baseline: the network of `photos_4x_small.py`, the squared error, one pass.

sr3 train --config=configs/photos_4x_small_regression.py --workdir=out/photos_4x_small_regression

The weights of the highest held-out PSNR are kept as out/photos_4x_small_regression/best.safetensors.
"""

from ml_collections import ConfigDict
from photos_4x_small import get_config as diffusion


def get_config() -> ConfigDict:
    """The diffusion's config with the lines of a regression (paper section 4) changed."""
    config = diffusion()
    config.model.regression = True
    config.update({"diffusion": {"kind": "y0", "norm": "l2"}, "checkpoint": {"best": True}})
    config.eval.update({"steps": 1, "solver": "ddim"})
    return config
