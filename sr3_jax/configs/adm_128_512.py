r"""ADM's ImageNet upsampler 128x128 -> 512x512, class-conditional, whose PyTorch weights `sr3 convert` reads.

sr3 convert 128_512_upsampler.pt -o adm_128_512.safetensors
sr3 train --config=adm_128_512 --workdir=out/adm --config.train.init_from=adm_128_512.safetensors

Dhariwal and Nichol, 2021: FID 3.85 on ImageNet 512x512 with samples of their guided 128x128 model.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import adm_64_256

PARAMETERS = 308_830_083


def get_config() -> ConfigDict:
    """The network, schedule and optimization of the published weights."""
    config = adm_64_256.get_config()
    config.model.update(attention_levels=(4, 5), heads=1, head_channels=64)  # 32x32, 16x16
    config.data.crop = 512
    return config
