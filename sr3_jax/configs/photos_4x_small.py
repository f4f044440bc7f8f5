"""Photographs at 4x with a smaller network, which `launch/quickstart.sh` trains in four minutes on two CPU cores.

sr3 train --config=photos_4x_small --workdir=out/photos_4x_small --config.train.minutes=4
"""

from ml_collections import ConfigDict

from sr3_jax.configs import photos_4x

PARAMETERS = 1_201_232


def get_config() -> ConfigDict:
    """The recipe of `photos_4x` with about a quarter of its parameters and a higher learning rate."""
    config = photos_4x.get_config()
    config.model.update(multipliers=(2, 3), num_blocks=(1, 1), stem_channels=0, output_skip=0.0)
    config.diffusion.norm = "l2"
    config.sampling.steps = 5
    config.data.crop = 64
    config.optim.update(learning_rate=1e-3, warmup_steps=100, ema_decay=0.995)
    config.train.num_steps = 100_000
    config.eval.every = 500
    return config
