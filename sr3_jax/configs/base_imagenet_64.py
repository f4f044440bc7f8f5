r"""ImageNet 64x64 from noise and a class label: the base model of the paper's 256x256 cascade.

sr3 train --config=base_imagenet_64 --workdir=out/base_imagenet_64 \
    --config.data.source=tfds:imagenet2012:train --config.data.eval_source=tfds:imagenet2012:validation

The paper reports FID 11.3 for the two-stage cascade at 256x256 (section 4.3), and no result for this stage.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import base_faces_64

PARAMETERS = 282_168_771


def get_config() -> ConfigDict:
    """The recipe of `base_faces_64` with labels; the paper does not give the size of its base models.

    Widths, depths and attention are those of the 64x64 network of Dhariwal and Nichol (2021, Table 11). A tenth of the
    labels is dropped for classifier-free guidance (Ho and Salimans 2021).
    """
    config = base_faces_64.get_config()
    config.model.update(
        channels=192,
        multipliers=(1, 2, 3, 4),
        attention_levels=(1, 2, 3),  # 32x32, 16x16, 8x8
        head_channels=64,
        num_classes=1000,
        remat=True,
    )
    config.data.update(
        source="tfds:imagenet2012:train", eval_source="tfds:imagenet2012:validation", label_dropout=0.1
    )
    return config
