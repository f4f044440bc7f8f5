r"""ImageNet at 64x64 from noise and a class: the base stage of the paper's class-conditional 256x256 cascade.

sr3 train --config=configs/base_imagenet_64.py --workdir=out/base_imagenet_64 \
    --config.data.source=tfds:imagenet2012:train \
    --config.data.eval_source=tfds:imagenet2012:validation

The paper reports FID 11.3 of the two-stage cascade at 256x256 (section 4.4), none of this stage alone.
"""

from base_faces_64 import get_config as faces
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe of the faces with labels; the paper gives no sizes of its base (open).

    Widths, depths and attention are those of Dhariwal and Nichol's 64x64 network (2021, Table 4). A tenth of the
    labels is dropped, so that samples can be guided (Ho and Salimans 2021).
    """
    config = faces()
    config.model.update(
        {"channels": 192, "multipliers": (1, 2, 3, 4), "attention_levels": (1, 2, 3)}  # 32x32, 16x16, 8x8
    )
    config.update({"model": {"num_classes": 1000, "head_channels": 64, "remat": True}})
    config.data.update({"source": "tfds:imagenet2012:train", "eval_source": "tfds:imagenet2012:validation"})
    config.update({"data": {"label_dropout": 0.1}})
    return config
