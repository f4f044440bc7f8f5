"""ORL faces 22x28 -> 88x112: 200 gray images of 20 people to train on, 20 other people for evaluation.

sr3 train --config=orl_4x --workdir=out/orl_4x
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 1_201_232


def get_config() -> ConfigDict:
    """A small network, sized for minutes on one CPU core."""
    return make_config(
        model={
            "channels": 32,
            "multipliers": (2, 3),
            "num_blocks": (1, 1),
            "layout": "efficient",
            "patch": 4,
            "norm": "pixel",
            "film": True,
            "dropout": 0.1,
            "mid_attention": False,
        },
        diffusion={
            "space": "residual",
            "residual_scale": 9.0,
            "prediction": "y0",
            "norm": "l2",
            "schedule": "cosine",
        },
        data={
            "source": "tfds:orl_faces:train",
            "eval_source": "tfds:orl_faces:gallery",
            "crop": 88,
            "scale": 4,
        },
        optim={"learning_rate": 1e-3, "warmup_steps": 200, "decay": "cosine", "ema_decay": 0.999},
        train={"num_steps": 3000, "batch_size": 8},
        eval={"every": 500, "num_images": 100},
        sampling={"steps": 10},
        checkpoint={"every": 500, "keep": 1},
    )
