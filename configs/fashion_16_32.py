"""The last stage of the small cascade: Fashion-MNIST, padded to 32x32, from 16x16, with noise on the condition.

sr3 train --config=configs/fashion_16_32.py --workdir=out/fashion_16_32
"""

from fashion_4x import get_config as at_4x
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The network and recipe of fashion_4x.py at 2x; it is told how noisy its low-res image was made."""
    config = at_4x()
    config.data.update(
        {
            "source": "tfds:fashion_mnist_32:train",
            "eval_source": "tfds:fashion_mnist_32:test",
            "crop": 32,
            "scale": 2,
        }
    )
    config.diffusion.residual_scale = 5.0
    config.train.num_steps = 4000
    config.update(
        {
            "model": {"augment": True},
            "data": {"augment": "noise", "augment_largest": 0.5, "augment_share": 0.75},
            "stage": {"name": "sr_32", "size": 32},
        }
    )
    return config
