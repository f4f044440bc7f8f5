"""The last stage of the small cascade: Fashion-MNIST, padded to 32x32, from 16x16, with noise on the condition.

sr3 train --config=configs/fashion_16_32.py --workdir=out/fashion_16_32
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The network and recipe of fashion_4x.py at 2x; it is told how noisy its low-res picture was made."""
    return ConfigDict(
        {
            "model": {
                "channels": 32,
                "multipliers": (1, 2),
                "num_blocks": (1, 2),
                "layout": "efficient",
                "patch": 2,
                "norm": "pixel",
                "film": True,
                "mid_attention": False,
                "augment": True,
            },
            "diffusion": {
                "space": "residual",
                "residual_scale": 5.0,
                "kind": "y0",
                "norm": "l2",
                "schedule": "cosine",
            },
            "data": {
                "source": "tfds:fashion_mnist_32:train",
                "eval_source": "tfds:fashion_mnist_32:test",
                "crop": 32,
                "mirror": False,
                "scale": 2,
                "augment": "noise",
                "augment_largest": 0.5,
                "augment_share": 0.75,
            },
            "optim": {
                "learning_rate": 1e-3,
                "warmup_steps": 200,
                "decay": "cosine",
                "ema_decay": 0.999,
            },
            "train": {"num_steps": 4000, "batch_size": 32},
            "eval": {"every": 1000, "num_images": 256, "steps": 10, "solver": "dpmpp_2m"},
            "checkpoint": {"every": 1000, "keep": 1},
            "stage": {"name": "sr_32", "size": 32},
        }
    )
