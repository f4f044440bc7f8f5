r"""Faces 64x64 -> 256x256 with blurred low-res images in training: the middle stage of the paper's face cascade.

sr3 train --config=faces_64_256 --workdir=out/faces_64_256 \
    --config.data.source=tfds:ffhq:train --config.data.eval_source=tfds:celeb_a_hq/256:train

The paper reports no result for this stage on its own.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import imagenet_64_256_blurred

PARAMETERS = 617_447_171


def get_config() -> ConfigDict:
    """The paper's 64 -> 256 network (Table A.1) on faces, with the blur of `imagenet_64_256_blurred`."""
    config = imagenet_64_256_blurred.get_config()
    config.data.update(source="tfds:ffhq:train", eval_source="tfds:celeb_a_hq/256:train")
    return config
