"""What makes a regression of a diffusion's config: `*_regression.py` share it."""

from ml_collections import ConfigDict


def regression(config: ConfigDict) -> ConfigDict:
    """The same config with the lines of the paper's baseline (section 4) changed."""
    config.model.regression = True
    config.update({"diffusion": {"prediction": "y0", "norm": "l2"}, "checkpoint": {"best": True}})
    config.eval.update({"steps": 1, "solver": "ddim"})
    return config
