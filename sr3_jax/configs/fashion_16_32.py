"""Fashion-MNIST 16x16 -> 32x32 with noise on the low-res image in training: the last stage of the small cascade.

sr3 train --config=fashion_16_32 --workdir=out/fashion_16_32
"""

from ml_collections import ConfigDict

from sr3_jax.configs import fashion_4x

PARAMETERS = 721_612


def get_config() -> ConfigDict:
    """The recipe of `fashion_4x` at 2x; the network takes the strength of the noise as an input."""
    config = fashion_4x.get_config()
    config.model.augment = True
    config.diffusion.residual_scale = 5.0
    config.data.update(
        source="tfds:fashion_mnist_32:train",
        eval_source="tfds:fashion_mnist_32:test",
        crop=32,
        scale=2,
        augment="noise",
        augment_largest=0.5,
        augment_share=0.75,
    )
    config.train.num_steps = 4000
    config.stage.update(name="sr_32", size=32)
    return config
