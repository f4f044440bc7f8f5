"""Photographs at 4x that are slightly blurred, noisy or compressed: the config of the shipped `photo_4x_robust`.

sr3 train --config=photos_4x_robust --workdir=out/photos_4x_robust --config.data.source=folder:PHOTOS

Its last 2,100 steps had --config.diffusion.lpips=0.5 too, which needs the extra `metrics`, and sampling has one step.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import photos_4x

PARAMETERS = 5_167_872


def get_config() -> ConfigDict:
    """`photos_4x` with degraded low-res images and noise-conditioning augmentation, started from its weights."""
    config = photos_4x.get_config()
    config.model.augment = True
    config.data.degradation = "photo"
    config.data.augment = "noise"
    config.data.augment_largest = 0.15
    config.data.augment_share = 0.25
    config.sampling.back_projection = 0  # it would restore the noise
    config.train.init_from = "photo_4x"
    return config
