"""Check that a model denoises: wrong weights anywhere show at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sr3_jax.data
from sr3_jax.diffusion.process import diffuse, to_y0
from sr3_jax.image_io.image_file import read_rgb
from sr3_jax.image_ops import degrade, resize_bicubic, to_uint8, to_unit
from sr3_jax.inference.model import Model
from sr3_jax.metrics import psnr
from sr3_jax.numerics import fixed_numerics
from sr3_jax.train.examples import condition
from sr3_jax.types import Conditioning, Image, Key, NoiseLevel

LOG_SNR = (4.0, 2.0, 0.0)  # at lower ones a good model is about as good as the reference
PHOTO = Path(sr3_jax.data.__file__).parent / "photos" / "test" / "jaguars.jpg"
CLASS = 290  # of the photograph in ImageNet
_LARGEST = 256  # pixels


@dataclass(frozen=True)
class Check:
    """How well a model denoises a photograph at one noise level.

    Attributes:
        log_snr: of the noise level.
        psnr: of the estimate of y0, in dB.
        reference: of the upsampled low-res image, in dB; of a gray image for a base model.
    """

    log_snr: float
    psnr: float
    reference: float

    @property
    def passed(self) -> bool:
        """Whether the estimate is nearer to the photograph than the reference."""
        return self.psnr > self.reference


@fixed_numerics()
def check_denoising(model: Model, *, label: int = CLASS, seed: int = 0) -> list[Check]:
    """One estimate of a bundled photograph from each of three noise levels.

    Args:
        label: for a class-conditional model; its last class if it has fewer.
    """
    network, data = model.network, model.config["data"]
    multiple = math.lcm(network.stride, model.scale)
    side = max(multiple, min(data["crop"] // data["shrink"], _LARGEST) // multiple * multiple)
    pixels = read_rgb(PHOTO)
    short = min(pixels.shape[:2])
    top, left = ((length - short) // 2 for length in pixels.shape[:2])
    square = to_unit(pixels[None, top : top + short, left : left + short])
    y0 = to_unit(to_uint8(resize_bicubic(square, side, side)))
    low_res = degrade(y0, model.scale) if network.low_res else None
    labels = jnp.array([min(label, network.num_classes - 1)]) if network.num_classes else None
    cond = condition(low_res, model.scale if network.low_res else None, labels, upsampling=data["upsampling"])
    denoiser = model.denoiser()

    @jax.jit
    def estimate(y0: Image, cond: Conditioning, gamma: NoiseLevel, key: Key) -> Image:
        z0 = model.space.encode(y0, cond)
        y_t = diffuse(z0, jax.random.normal(key, z0.shape), gamma)
        output = denoiser(y_t, gamma, cond)[..., : y0.shape[-1]]  # the rest is the variance
        return model.space.decode(to_y0(output, y_t, gamma, model.prediction), cond)

    truth = to_uint8(y0)
    reference = float(psnr(to_uint8(cond.get("upsampled", jnp.zeros_like(y0))), truth)[0])
    found = []
    for level in LOG_SNR:
        gamma = jnp.full((1,), 1.0 / (1.0 + np.exp(-level)), jnp.float32)
        image = estimate(y0, cond, gamma, jax.random.key(seed))
        value = float(psnr(to_uint8(image), truth)[0]) if bool(jnp.all(jnp.isfinite(image))) else -math.inf
        found.append(Check(level, value, reference))
    return found
