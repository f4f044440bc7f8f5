r"""Faces 64x64 -> 512x512: the paper's 625M-parameter network.

sr3 train --config=configs/faces_64_512.py --workdir=out/faces_64_512 \
    --config.data.source=tfds:ffhq:train \
    --config.data.eval_source=tfds:celeb_a_hq/512:train

The paper gives images and human fool rates for this task, no PSNR.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Table 1 of the paper, with its optimisation (section 3); where the paper is silent, the package's defaults."""
    return ConfigDict(
        {
            "model": {
                "channels": 64,
                "multipliers": (1, 2, 4, 8, 8, 16, 16),
                "num_blocks": (3, 3, 3, 3, 3, 3, 3),
                "attention_levels": (5,),  # 16x16
                "dropout": 0.0,
                "dtype": "bfloat16",
                "remat": True,
            },
            "data": {
                "source": "tfds:ffhq:train",
                "eval_source": "tfds:celeb_a_hq/512:train",
                "framing": "square",
                "crop": 512,
                "scale": 8,
                "threads": 16,
            },
            "train": {"num_steps": 1_000_000, "batch_size": 256},
            "eval": {"num_images": 256},
            "sampling": {"steps": 100, "solver": "ancestral"},
            "mesh": {"data": -1, "fsdp": 8},
        }
    )
