"""Fashion-MNIST 8x8 from noise and a class label: the base model of the small cascade.

sr3 train --config=base_fashion_8 --workdir=out/base_fashion_8

Images are padded to 32x32 and downsampled by 4.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 1_750_307


def get_config() -> ConfigDict:
    """A small network that predicts v; a tenth of the labels is dropped for classifier-free guidance."""
    return make_config(
        model={
            "channels": 32,
            "multipliers": (2, 3),
            "num_blocks": (2, 2),
            "layout": "efficient",
            "norm": "pixel",
            "film": True,
            "num_classes": 10,
            "low_res": False,
        },
        diffusion={"prediction": "v", "norm": "l2", "schedule": "cosine"},
        data={
            "source": "tfds:fashion_mnist_32:train",
            "eval_source": "tfds:fashion_mnist_32:test",
            "crop": 32,
            "mirror": False,
            "shrink": 4,
            "scale": 1,
            "label_dropout": 0.1,
        },
        optim={"learning_rate": 1e-3, "warmup_steps": 200, "decay": "cosine", "ema_decay": 0.999},
        train={"num_steps": 3000, "batch_size": 64},
        eval={"every": 1000, "num_images": 256},
        sampling={"steps": 25},
        checkpoint={"every": 1000, "keep": 1},
        stage={"name": "base", "size": 8},
    )
