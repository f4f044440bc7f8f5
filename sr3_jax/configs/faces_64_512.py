r"""Faces 64x64 -> 512x512 with the paper's 625 M-parameter network.

sr3 train --config=faces_64_512 --workdir=out/faces_64_512 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/512:train

The paper shows images for this task, but gives no metrics.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import faces_16_128

PARAMETERS = 609_802_371


def get_config() -> ConfigDict:
    """The paper's network (Table A.1) and optimization (section 4); defaults where the paper gives no value."""
    config = faces_16_128.get_config()
    config.model.update(
        channels=64,
        multipliers=(1, 2, 4, 8, 8, 16, 16),
        num_blocks=(3, 3, 3, 3, 3, 3, 3),
        attention_levels=(5,),  # 16x16
        dropout=0.0,
    )
    config.data.update(eval_source="tfds:celeb_a_hq/512:train", crop=512)
    return config
