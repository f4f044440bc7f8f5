r"""Faces 64x64 -> 512x512 with space-to-depth: the task of `faces_64_512`, for the matrix units of TPUs and GPUs.

sr3 train --config=faces_64_512_patch2 --workdir=out/faces_64_512_patch2 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/512:train

The paper's network has 64 channels at 512x512, half the width of a TPU's matrix unit. Here each 2x2 block of pixels is
one position, and the network begins at the paper's second level, 256x256 with 128 channels. The results differ from
those of the paper's network.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import faces_64_512

PARAMETERS = 617_149_580


def get_config() -> ConfigDict:
    """The paper's network without its first level, which the space-to-depth transform replaces."""
    config = faces_64_512.get_config()
    config.model.update(
        channels=128,
        patch=2,
        multipliers=(1, 2, 4, 4, 8, 8),
        num_blocks=(3, 3, 3, 3, 3, 3),
        attention_levels=(4,),  # 16x16
        remat_keeps="convs",
    )
    return config
