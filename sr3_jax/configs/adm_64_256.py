r"""ADM's ImageNet upsampler 64x64 -> 256x256, class-conditional, whose PyTorch weights `sr3 convert` reads.

sr3 convert 64_256_upsampler.pt -o adm_64_256.safetensors
sr3 train --config=adm_64_256 --workdir=out/adm --config.train.init_from=adm_64_256.safetensors

Dhariwal and Nichol, 2021: FID 3.94 on ImageNet 256x256 with samples of their guided 64x64 model.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import make_config

PARAMETERS = 311_790_723


def get_config() -> ConfigDict:
    """The network, schedule and optimization of the published weights."""
    return make_config(
        model={
            "network": "adm",
            "channels": 192,
            "multipliers": (1, 1, 2, 2, 4, 4),
            "num_blocks": (2,) * 6,
            "attention_levels": (3, 4, 5),  # 32x32, 16x16, 8x8
            "heads": 4,
            "film": True,
            "num_classes": 1000,
            "timesteps": 1000,
        },
        diffusion={
            "prediction": "eps",
            "norm": "l2",
            "schedule": "linear",
            "num_steps": 1000,
            "beta_start": 1e-4,
            "beta_end": 0.02,
        },
        data={
            "source": "tfds:imagenet2012:train",
            "eval_source": "tfds:imagenet2012:validation",
            "crop": 256,
            "scale": 4,
            "upsampling": "bilinear",
        },
    )
