"""Fashion-MNIST 7x7 -> 28x28: images with class labels, so that a classifier can evaluate the outputs.

sr3 train --config=fashion_4x --workdir=out/fashion_4x
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 700_876


def get_config() -> ConfigDict:
    """A small network, sized for minutes on one CPU core."""
    return make_config(
        model={
            "channels": 32,
            "multipliers": (1, 2),
            "num_blocks": (1, 2),
            "layout": "efficient",
            "patch": 2,
            "norm": "pixel",
            "film": True,
            "mid_attention": False,
        },
        diffusion={
            "space": "residual",
            "residual_scale": 3.0,
            "prediction": "y0",
            "norm": "l2",
            "schedule": "cosine",
        },
        data={
            "source": "tfds:fashion_mnist:train",
            "eval_source": "tfds:fashion_mnist:test",
            "crop": 28,
            "mirror": False,
            "scale": 4,
        },
        optim={"learning_rate": 1e-3, "warmup_steps": 200, "decay": "cosine", "ema_decay": 0.999},
        train={"num_steps": 5000, "batch_size": 32},
        eval={"every": 1000, "num_images": 256},
        sampling={"steps": 10},
        checkpoint={"every": 1000, "keep": 1},
    )
