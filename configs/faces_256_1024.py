r"""Faces 256x256 -> 1024x1024: the paper's 150M-parameter network, last stage of its face cascade.

sr3 train --config=configs/faces_256_1024.py --workdir=out/faces_256_1024 \
    --config.data.source=tfds:ffhq:train \
    --config.data.eval_source=tfds:celeb_a_hq/1024:train

The paper gives images and a cascade's FID for this task, no PSNR.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Table 1 of the paper, with its optimisation (section 3); where the paper is silent, the package's defaults."""
    return ConfigDict(
        {
            "model": {
                "channels": 16,
                "multipliers": (1, 2, 4, 8, 16, 32, 32, 32),
                "num_blocks": (2, 2, 2, 2, 2, 2, 2, 2),
                "attention_levels": (6,),  # 16x16
                "dropout": 0.0,
                "dtype": "bfloat16",
                "remat": True,
            },
            "data": {
                "source": "tfds:ffhq:train",
                "eval_source": "tfds:celeb_a_hq/1024:train",
                "framing": "square",
                "crop": 1024,
                "scale": 4,
                "threads": 16,
            },
            "train": {"num_steps": 1_000_000, "batch_size": 256},
            "eval": {"num_images": 256},
            "sampling": {"steps": 100, "solver": "ancestral"},
            "mesh": {"data": -1, "fsdp": 8},
            "stage": {"name": "sr_1024", "size": 1024},
        }
    )
