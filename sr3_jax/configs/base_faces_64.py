r"""Faces 64x64 from noise: the base model of the paper's face cascade.

sr3 train --config=base_faces_64 --workdir=out/base_faces_64 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/256:train

The paper reports no result for this stage on its own.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 317_872_003


def get_config() -> ConfigDict:
    """The paper's network without a low-res image; the paper does not give the size of its base models.

    Channels and levels are those of the 16 -> 128 network down to 8x8, with attention at 16x16 as there. The schedule
    is cosine, since the linear one wastes steps on noise at 64x64 (Nichol and Dhariwal 2021), and the network predicts
    v, which stays accurate near pure noise. Images are downsampled from 256x256, like the next stage's low-res images.
    """
    return make_config(
        model={
            "channels": 128,
            "multipliers": (1, 2, 4, 8),
            "num_blocks": (3, 3, 3, 3),
            "attention_levels": (2,),  # 16x16
            "dropout": 0.1,
            "dtype": "bfloat16",
            "low_res": False,
        },
        diffusion={"prediction": "v", "norm": "l2", "schedule": "cosine"},
        data={
            "source": "tfds:ffhq:train",
            "eval_source": "tfds:celeb_a_hq/256:train",
            "framing": "square",
            "crop": 256,
            "shrink": 4,
            "scale": 1,
            "threads": 16,
        },
        train={"num_steps": 1_000_000, "batch_size": 256},
        eval={"num_images": 256},
        sampling={"steps": 100, "solver": "ddpm"},
        stage={"name": "base", "size": 64},
    )
