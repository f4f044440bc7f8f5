r"""Faces at 64x64 from noise: the base stage of the paper's face cascade.

sr3 train --config=configs/base_faces_64.py --workdir=out/base_faces_64 \
    --config.data.source=tfds:ffhq:train \
    --config.data.eval_source=tfds:celeb_a_hq/256:train

The paper reports no figure of this stage alone.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's network without the low-res image; of the base it gives no sizes (open).

    Channels and levels are those of the paper's own 16 -> 128 network down to 8x8, attention at 16x16 as there. The
    cosine schedule, since the linear one wastes steps on noise at 64x64 (Nichol and Dhariwal 2021), and v, which it
    needs near pure noise. Images are shrunk from 256 as the next stage's low-res ones are.
    """
    return ConfigDict(
        {
            "model": {
                "channels": 128,
                "multipliers": (1, 2, 4, 8),
                "num_blocks": (3, 3, 3, 3),
                "attention_levels": (2,),  # 16x16
                "dropout": 0.1,
                "dtype": "bfloat16",
                "low_res": False,
            },
            "diffusion": {"prediction": "v", "norm": "l2", "schedule": "cosine"},
            "data": {
                "source": "tfds:ffhq:train",
                "eval_source": "tfds:celeb_a_hq/256:train",
                "framing": "square",
                "crop": 256,
                "shrink": 4,
                "scale": 1,
                "threads": 16,
            },
            "train": {"num_steps": 1_000_000, "batch_size": 256},
            "eval": {"num_images": 256},
            "sampling": {"steps": 100, "solver": "ancestral"},
            "mesh": {"data": -1, "fsdp": 8},
            "stage": {"name": "base", "size": 64},
        }
    )
