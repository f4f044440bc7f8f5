"""Photographs at 4x, small: the network that `launch/quickstart.sh` trains in about four minutes on two cores.

sr3 train --config=configs/photos_4x_small.py --workdir=out/photos_4x_small --config.train.minutes=4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The shipped model's recipe with a quarter of its weights and a faster rate."""
    return ConfigDict(
        {
            "model": {
                "channels": 32,
                "multipliers": (2, 3),
                "num_blocks": (1, 1),
                "layout": "efficient",
                "patch": 4,
                "norm": "pixel",
                "film": True,
                "mid_attention": False,
            },
            "diffusion": {
                "space": "residual",
                "residual_scale": 8.0,
                "prediction": "y0",
                "norm": "l2",
                "schedule": "cosine",
            },
            "data": {"source": "photos:train", "crop": 64, "scale": 4},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 100, "ema_decay": 0.995},
            "train": {"num_steps": 100_000, "batch_size": 16},
            "eval": {"every": 500, "num_images": 8},
            "sampling": {"steps": 5, "solver": "dpmpp_2m"},
            "checkpoint": {"every": 500},
        }
    )
