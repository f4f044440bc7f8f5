"""Photographs at 4x: the config of the shipped model `photo_4x`.

sr3 train --config=photos_4x --workdir=out/photos_4x --config.data.source=folder:PHOTOS
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 5_147_136


def get_config() -> ConfigDict:
    """A small network in residual space, sized for a few hours on the CPU of a laptop."""
    return make_config(
        model={
            "channels": 32,
            "multipliers": (4, 5),
            "num_blocks": (2, 2),
            "layout": "efficient",
            "patch": 4,
            "norm": "pixel",
            "film": True,
            "mid_attention": False,
            "stem_channels": 96,
            "output_skip": 0.05,
        },
        diffusion={
            "space": "residual",
            "residual_scale": 8.0,
            "prediction": "y0",
            "norm": "l1",
            "schedule": "cosine",
        },
        data={"source": "photos:train", "crop": 96, "scale": 4},
        optim={
            "optimizer": "muon",
            "learning_rate": 2.5e-3,
            "b1": 0.95,
            "warmup_steps": 100,
            "ema_decay": 0.999,
        },
        train={"num_steps": 1_000_000, "batch_size": 16},
        eval={"every": 1000, "num_images": 8},
        sampling={"steps": 10, "back_projection": 3},
        checkpoint={"every": 500},
    )
