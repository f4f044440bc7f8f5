r"""Faces 256x256 -> 1024x1024 with the paper's 150 M-parameter network: the last stage of its face cascade.

sr3 train --config=faces_256_1024 --workdir=out/faces_256_1024 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/1024:train

The paper shows images of the cascade for this task, but gives no metrics.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import faces_16_128

PARAMETERS = 148_746_931


def get_config() -> ConfigDict:
    """The paper's network (Table A.1) and optimization (section 4); defaults where the paper gives no value."""
    config = faces_16_128.get_config()
    config.model.update(
        channels=16,
        multipliers=(1, 2, 4, 8, 16, 32, 32, 32),
        num_blocks=(2, 2, 2, 2, 2, 2, 2, 2),
        attention_levels=(6,),  # 16x16
        dropout=0.0,
    )
    config.data.update(eval_source="tfds:celeb_a_hq/1024:train", crop=1024, scale=4)
    config.stage.update(name="sr_1024", size=1024)
    return config
