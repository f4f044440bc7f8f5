r"""ImageNet 64x64 -> 256x256: the paper's 625M-parameter network.

sr3 train --config=configs/imagenet_64_256.py --workdir=out/imagenet_64_256 \
    --config.data.source=tfds:imagenet2012:train \
    --config.data.eval_source=tfds:imagenet2012:validation

Paper (ImageNet validation): FID 5.2, IS 180.1, PSNR 26.4 dB, SSIM 0.762 after 1M steps of batch 256.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Table 1 of the paper, with its optimisation (section 3); where the paper is silent, the package's defaults."""
    return ConfigDict(
        {
            "model": {
                "channels": 128,
                "multipliers": (1, 2, 4, 4, 8, 8),
                "num_blocks": (3, 3, 3, 3, 3, 3),
                "attention_levels": (4,),  # 16x16
                "dropout": 0.0,
                "dtype": "bfloat16",
                "remat": True,
            },
            "data": {
                "source": "tfds:imagenet2012:train",
                "eval_source": "tfds:imagenet2012:validation",
                "framing": "square",
                "crop": 256,
                "scale": 4,
                "threads": 16,
            },
            "train": {"num_steps": 1_000_000, "batch_size": 256},
            "eval": {"num_images": 256},
            "sampling": {"steps": 100, "solver": "ancestral"},
            "mesh": {"data": -1, "fsdp": 8},
        }
    )
