r"""Faces 64x64 -> 256x256: the middle stage of the paper's face cascade, its condition blurred in training.

sr3 train --config=configs/faces_64_256.py --workdir=out/faces_64_256 \
    --config.data.source=tfds:ffhq:train \
    --config.data.eval_source=tfds:celeb_a_hq/256:train

The paper reports no figure of this stage alone.
"""

from imagenet_64_256_blurred import get_config as imagenet
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's 64 -> 256 network (Table 1) on faces.

    Half of the low-res images are blurred, as the paper does (section 4.4); how much it leaves open. Up to 0.6
    pixels is what Ho et al. 2021 ("Cascaded Diffusion Models") give for 64 -> 256. The network is told how much.
    """
    config = imagenet()
    config.data.update({"source": "tfds:ffhq:train", "eval_source": "tfds:celeb_a_hq/256:train"})
    return config
