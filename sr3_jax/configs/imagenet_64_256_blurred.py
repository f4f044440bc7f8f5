r"""ImageNet 64x64 -> 256x256 with blurred low-res images in training: the last stage of the paper's 256x256 cascade.

sr3 train --config=imagenet_64_256_blurred --workdir=out/imagenet_64_256_blurred \
    --config.data.source=tfds:imagenet2012:train --config.data.eval_source=tfds:imagenet2012:validation

Paper (ablation of the cascade, Table 5): FID 13.1 without blur, 11.3 with it.
"""

from ml_collections import ConfigDict

from sr3_jax.configs import imagenet_64_256

PARAMETERS = 617_447_171


def get_config() -> ConfigDict:
    """The network of `imagenet_64_256`, which takes the strength of the blur as an input.

    The paper blurs by varying amounts, which it does not give. As in Ho et al. 2021 ("Cascaded Diffusion Models"), half
    of the low-res images are blurred, with a standard deviation of up to 0.6 pixels.
    """
    config = imagenet_64_256.get_config()
    config.model.augment = True
    config.data.update(augment="blur", augment_largest=0.6, augment_share=0.5)
    config.stage.update(name="sr_256", size=256)
    return config
