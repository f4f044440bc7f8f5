r"""ImageNet 64x64 -> 256x256 with the paper's 625 M-parameter network.

sr3 train --config=imagenet_64_256 --workdir=out/imagenet_64_256 \
    --config.data.source=tfds:imagenet2012:train --config.data.eval_source=tfds:imagenet2012:validation

Paper (ImageNet validation): FID 5.2, IS 180.1, PSNR 26.4 dB, SSIM 0.762 after 1 M steps with batch size 256.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import faces_16_128

PARAMETERS = 617_118_467


def get_config() -> ConfigDict:
    """The paper's network (Table A.1) and optimization (section 4); defaults where the paper gives no value."""
    config = faces_16_128.get_config()
    config.model.update(
        multipliers=(1, 2, 4, 4, 8, 8),
        num_blocks=(3, 3, 3, 3, 3, 3),
        attention_levels=(4,),  # 16x16
        dropout=0.0,
    )
    config.data.update(
        source="tfds:imagenet2012:train", eval_source="tfds:imagenet2012:validation", crop=256, scale=4
    )
    return config
