r"""Faces 256x256 -> 1024x1024 with space-to-depth: the task of `faces_256_1024`, for the matrix units of TPUs and GPUs.

sr3 train --config=faces_256_1024_patch4 --workdir=out/faces_256_1024_patch4 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/1024:train

The paper's network has 16 channels at 1024x1024, which reach 1.4 % of the peak of a TPU by the estimate of its
compiler; 128 channels reach 54 %. Here each 4x4 block of pixels is one position with 128 channels, and level 0 is
256x256. The results differ from those of the paper's network.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import faces_256_1024

PARAMETERS = 113_884_208


def get_config() -> ConfigDict:
    """Five of the paper's eight levels, from 256x256 to 16x16, with at least 128 channels; the rest is the paper's."""
    config = faces_256_1024.get_config()
    config.model.update(
        channels=128,
        patch=4,
        multipliers=(1, 1, 2, 4, 4),
        num_blocks=(2, 2, 2, 2, 2),
        attention_levels=(4,),  # 16x16
        remat_keeps="convs",
    )
    return config
