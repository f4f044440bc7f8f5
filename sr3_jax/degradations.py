"""Degradations of training images: what turns a high-res image into the low-res image that a model must undo.

Two kinds, which combine:

- `Degradation`: blur, resizing, noise and JPEG compression of random strengths, in one or two rounds, as in Real-ESRGAN
  (Wang et al. 2021, section 3) and SR3+ (Sahak et al. 2023, section 4.1). `CLEAN`, bicubic downsampling, is SR3's own.
- `ConditioningAugmentation`: blur or noise of a strength that the network may take as an input. The paper blurs the
  low-res images of a cascade's stage in training, but not in sampling (section 4.3). Ho et al. 2021 ("Cascaded
  Diffusion Models") blur half of the examples and find noise better at low resolutions. Saharia et al. 2022 (Imagen)
  condition the network on the strength; in SR3+ the user chooses it, and so how far the model trusts its input.

Everything is pure and runs on the device. Each example has its own key, so it does not depend on the rest of its batch.
Images are float32 in [-1,1]. Shape legend: B batch, H height, W width, C channels, s the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from sr3_jax import jpeg
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.types import Image, Key

AugmentationKind = Literal["blur", "noise"]
Range = tuple[float, float]

_BLUR_REACH = 10  # pixels on each side: kernels of 21x21, as in Real-ESRGAN
_RESIZE_KERNELS = ("area", "bilinear", "bicubic")
_EXACT = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class DegradationRound:
    """One round of a degradation: blur, resize, noise, JPEG. A range is (least, most); values are uniform in it.

    Attributes:
        blur_prob: fraction of the examples that are blurred.
        blur_sigma: standard deviation of the blur in pixels of the round's input, per axis.
        blur_sinc_prob: fraction of the blurred examples whose blur is an ideal low-pass filter (sinc), which rings.
        blur_anisotropic_prob: fraction of the other kernels that have two different widths and a random direction.
        blur_generalized_prob, blur_plateau_prob: fractions of the kernels that are not Gaussian: exp(-(r^2)^b / 2) with
            b in (0.5, 4), and 1 / (1 + (r^2)^b) with b in (1, 2).
        resize: factor of the intermediate size; not used in the last round, which ends at the low-res size.
        resize_random_kernel: resize by area, bilinear or bicubic at random (all anti-aliased) instead of bicubic.
        noise_prob: fraction of the examples with noise.
        noise_sigma: standard deviation of the Gaussian noise in levels of 255.
        noise_gray_prob: fraction of the noisy examples with the same noise in all channels.
        noise_poisson_prob: fraction of the noisy examples with Poisson noise instead of Gaussian.
        noise_poisson_scale: factor on the Poisson noise of an image whose levels are counts of photons.
        jpeg_prob: fraction of the examples that are compressed.
        jpeg_quality: from 1 to 100.
        sinc_prob: fraction of the examples with a sinc filter at the end of the round, before or after the compression.
    """

    blur_prob: float = 0.0
    blur_sigma: Range = (0.2, 3.0)
    blur_sinc_prob: float = 0.0
    blur_anisotropic_prob: float = 0.0
    blur_generalized_prob: float = 0.0
    blur_plateau_prob: float = 0.0
    resize: Range = (1.0, 1.0)
    resize_random_kernel: bool = False
    noise_prob: float = 0.0
    noise_sigma: Range = (1.0, 30.0)
    noise_gray_prob: float = 0.0
    noise_poisson_prob: float = 0.0
    noise_poisson_scale: Range = (0.05, 3.0)
    jpeg_prob: float = 0.0
    jpeg_quality: Range = (30.0, 95.0)
    sinc_prob: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether the round does nothing but resize by bicubic to the low-res size."""
        probabilities = (self.blur_prob, self.noise_prob, self.jpeg_prob, self.sinc_prob)
        return not any(probabilities) and self.resize == (1.0, 1.0) and not self.resize_random_kernel


@dataclass(frozen=True)
class Degradation:
    """A random degradation; the example's low-res image has 1/s of the size of its high-res image.

    Attributes:
        first: the first round.
        second: the second round; a clean one is left out.
    """

    first: DegradationRound = DegradationRound()
    second: DegradationRound = DegradationRound()

    @property
    def is_clean(self) -> bool:
        """Whether it is the bicubic downsampling of the paper, which needs no key."""
        return self.first.is_clean and self.second.is_clean

    def apply(self, key: Key, image: Image, scale: int) -> Image:
        """Degrade images [B,H,W,3] in [-1,1] to [B,H/s,W/s,3], rounded to uint8 levels.

        Args:
            key: one key for the batch, or [B] keys.

        Raises:
            ValueError: H or W is not divisible by the scale.
        """
        height, width = image.shape[1:3]
        if self.is_clean or height % scale or width % scale:
            return degrade(image, scale)
        keys = jax.random.split(key, len(image)) if key.ndim == 0 else key
        size = (height // scale, width // scale)

        def one(key: Key, image: jax.Array) -> jax.Array:
            first_key, second_key = jax.random.split(key)
            levels, valid = (image + 1.0) * 127.5, _whole(image)
            if not self.second.is_clean:
                levels, valid = _apply_round(first_key, levels, valid, self.first, None)
            last = self.first if self.second.is_clean else self.second
            levels, _ = _apply_round(second_key, levels, valid, last, size)
            return levels / 127.5 - 1.0

        return to_unit(to_uint8(jax.vmap(one)(keys, image)))


CLEAN = Degradation()
# What a phone or a web page does to a photograph: a little blur, a little noise, one JPEG.
PHOTO = Degradation(
    DegradationRound(
        blur_prob=0.5,
        blur_sigma=(0.2, 1.5),
        blur_anisotropic_prob=0.3,
        blur_generalized_prob=0.1,
        blur_plateau_prob=0.1,
        resize_random_kernel=True,
        noise_prob=0.5,
        noise_sigma=(0.5, 10.0),
        noise_gray_prob=0.4,
        noise_poisson_prob=0.3,
        noise_poisson_scale=(0.05, 1.0),
        jpeg_prob=0.75,
        jpeg_quality=(50.0, 95.0),
    )
)
# The ranges of Real-ESRGAN's published training options (Wang et al. 2021, section 4.1 and its repository's options).
WILD = Degradation(
    DegradationRound(
        blur_prob=1.0,
        blur_sigma=(0.2, 3.0),
        blur_sinc_prob=0.1,
        blur_anisotropic_prob=0.4,
        blur_generalized_prob=0.15,
        blur_plateau_prob=0.15,
        resize=(0.15, 1.5),
        resize_random_kernel=True,
        noise_prob=1.0,
        noise_sigma=(1.0, 30.0),
        noise_gray_prob=0.4,
        noise_poisson_prob=0.5,
        noise_poisson_scale=(0.05, 3.0),
        jpeg_prob=1.0,
        jpeg_quality=(30.0, 95.0),
    ),
    DegradationRound(
        blur_prob=0.8,
        blur_sigma=(0.2, 1.5),
        blur_sinc_prob=0.1,
        blur_anisotropic_prob=0.4,
        blur_generalized_prob=0.15,
        blur_plateau_prob=0.15,
        resize_random_kernel=True,
        noise_prob=1.0,
        noise_sigma=(1.0, 25.0),
        noise_gray_prob=0.4,
        noise_poisson_prob=0.5,
        noise_poisson_scale=(0.05, 2.5),
        jpeg_prob=1.0,
        jpeg_quality=(30.0, 95.0),
        sinc_prob=0.8,
    ),
)
PRESETS = {"clean": CLEAN, "photo": PHOTO, "wild": WILD}


@dataclass(frozen=True)
class ConditioningAugmentation:
    """The augmentation of low-res images in training.

    Attributes:
        kind: 'blur' (Gaussian) or 'noise' (variance-preserving Gaussian, as in diffusion).
        largest: standard deviation at strength 1: for blur in low-res pixels, above 0; for noise at most 1.
        share: fraction of the examples that are augmented, each with a strength uniform in (0,1).
    """

    kind: AugmentationKind
    largest: float
    share: float = 0.5

    def sample(self, key: Key, low_res: Image) -> tuple[Image, jax.Array]:
        """Augment low_res [B,H,W,C] at random. Returns the images and strengths [B], 0 if not augmented."""
        strength_key, share_key, noise_key = jax.random.split(key, 3)
        batch_size = low_res.shape[0]
        strength = jax.random.uniform(strength_key, (batch_size,))
        strength = jnp.where(jax.random.bernoulli(share_key, self.share, (batch_size,)), strength, 0.0)
        return self.apply(noise_key, low_res, strength), strength

    def apply(
        self,
        key: Key,
        low_res: Image,
        strength: jax.Array,
        *,
        normal: Callable[[Key], jax.Array] | None = None,
    ) -> Image:
        """Augment low_res [B,H,W,C] with given strengths [B] in [0,1]; at 0 an image is unchanged, bit for bit.

        Args:
            key: one key for the batch, or [B] keys, which make each example independent of the rest of its batch.
            normal: key, or keys, to standard normal noise [B,H,W,C]; None for `jax.random.normal`.
        """
        if self.kind == "blur":
            return blur(low_res, self.largest * strength, reach=math.ceil(3 * self.largest))
        if normal is not None:
            noise = normal(key)
        elif key.ndim == 0:
            noise = jax.random.normal(key, low_res.shape)
        else:
            noise = jax.vmap(lambda one: jax.random.normal(one, low_res.shape[1:]))(key)
        variance = jnp.square(self.largest * strength)[:, None, None, None]
        return jnp.sqrt(1.0 - variance) * low_res + jnp.sqrt(variance) * noise


def blur(x: Image, sigma: jax.Array, *, reach: int) -> Image:
    """Gaussian blur of x [B,H,W,C] with edge padding; at sigma 0 an image is unchanged, bit for bit.

    Args:
        sigma: [B] standard deviations in pixels.
        reach: the kernel is truncated this many pixels from its center.
    """
    offsets = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    # At sigma 0 all weights but the central one underflow to 0.
    squared = jnp.square(offsets)[None, :] / jnp.square(jnp.maximum(sigma, 1e-3))[:, None]  # [B,K]
    weights = jnp.exp(-0.5 * squared)
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    for axis in (1, 2):
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x, padding, mode="edge")
        parts = (
            weights[:, k, None, None, None] * jax.lax.slice_in_dim(padded, k, k + x.shape[axis], axis=axis)
            for k in range(2 * reach + 1)
        )
        x = sum(parts, jnp.zeros_like(x))
    return x


# ---- The steps of a round, for one image [H,W,C] in levels of 255


def _uniform(key: Key, bounds: Range) -> jax.Array:
    return jax.random.uniform(key, minval=bounds[0], maxval=bounds[1])


def _whole(image: jax.Array) -> jax.Array:
    return jnp.array(image.shape[:2])


def _apply_round(
    key: Key, image: jax.Array, valid: jax.Array, settings: DegradationRound, size: tuple[int, int] | None
) -> tuple[jax.Array, jax.Array]:
    """Apply one round to the top left `valid` pixels of an image; `size` None for a random size."""
    blur_key, resize_key, noise_key, jpeg_key, sinc_key = jax.random.split(key, 5)
    image = _random_blur(blur_key, image, settings)
    if size is None:
        image, valid = _random_resize(resize_key, image, settings)
    else:
        image = _resize(image, valid, size, _random_kernel(resize_key, settings))
    image = _random_noise(noise_key, image, settings)
    if not settings.sinc_prob:
        return _random_jpeg(jpeg_key, image, settings), valid
    cutoff_key, used_key, order_key = jax.random.split(sinc_key, 3)
    used = jax.random.bernoulli(used_key, settings.sinc_prob)
    first = jax.random.bernoulli(order_key)
    kernel = _sinc_kernel(_cutoff(cutoff_key))
    image = jnp.where(used & first, _filter(image, kernel), image)
    image = _random_jpeg(jpeg_key, image, settings)
    return jnp.where(used & ~first, _filter(image, kernel), image), valid


def _random_blur(key: Key, image: jax.Array, settings: DegradationRound) -> jax.Array:
    if not settings.blur_prob:
        return image
    used_key, sinc_key, cutoff_key, kernel_key = jax.random.split(key, 4)
    kernel = _blur_kernel(kernel_key, settings)
    if settings.blur_sinc_prob:
        is_sinc = jax.random.bernoulli(sinc_key, settings.blur_sinc_prob)
        kernel = jnp.where(is_sinc, _sinc_kernel(_cutoff(cutoff_key)), kernel)
    return jnp.where(jax.random.bernoulli(used_key, settings.blur_prob), _filter(image, kernel), image)


def _offsets() -> tuple[jax.Array, jax.Array]:
    side = jnp.arange(-_BLUR_REACH, _BLUR_REACH + 1, dtype=jnp.float32)
    return side[:, None], side[None, :]


def _blur_kernel(key: Key, settings: DegradationRound) -> jax.Array:
    """A random kernel [21,21] with sum 1."""
    keys = jax.random.split(key, 7)
    anisotropic = jax.random.bernoulli(keys[0], settings.blur_anisotropic_prob)
    sigma_x = _uniform(keys[1], settings.blur_sigma)
    sigma_y = jnp.where(anisotropic, _uniform(keys[2], settings.blur_sigma), sigma_x)
    angle = _uniform(keys[3], (0.0, math.pi))
    y, x = _offsets()
    along, across = jnp.cos(angle) * x + jnp.sin(angle) * y, jnp.cos(angle) * y - jnp.sin(angle) * x
    squared = jnp.square(along / sigma_x) + jnp.square(across / sigma_y)
    shape = jax.random.uniform(keys[4])
    generalized = jnp.exp(-0.5 * squared ** _uniform(keys[5], (0.5, 4.0)))
    plateau = 1.0 / (1.0 + squared ** _uniform(keys[6], (1.0, 2.0)))
    kernel = jnp.where(shape < settings.blur_generalized_prob, generalized, jnp.exp(-0.5 * squared))
    kernel = jnp.where(shape > 1.0 - settings.blur_plateau_prob, plateau, kernel)
    return kernel / jnp.sum(kernel)


def _cutoff(key: Key) -> jax.Array:
    """Angular frequency at which a sinc filter cuts off."""
    return _uniform(key, (math.pi / 3, math.pi))


def _sinc_kernel(cutoff: jax.Array) -> jax.Array:
    """The ideal circular low-pass filter, truncated to [21,21], with sum 1: c J1(c r) / (2 pi r)."""
    y, x = _offsets()
    radius = jnp.maximum(jnp.sqrt(jnp.square(x) + jnp.square(y)), 1e-6)
    # J1(z) as the mean of cos(t - z sin t) over t in (0, pi): exact to rounding for z < 45 with 64 midpoints.
    angles = ((jnp.arange(64) + 0.5) * (math.pi / 64))[None, None, :]
    phase = angles - (cutoff * radius)[..., None] * jnp.sin(angles)
    kernel = cutoff * jnp.mean(jnp.cos(phase), axis=-1) / (2.0 * math.pi * radius)
    kernel = kernel.at[_BLUR_REACH, _BLUR_REACH].set(jnp.square(cutoff) / (4.0 * math.pi))
    return kernel / jnp.sum(kernel)


def _filter(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve [H,W,C] with a symmetric kernel [21,21], with edge padding."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((_BLUR_REACH, _BLUR_REACH), (_BLUR_REACH, _BLUR_REACH), (0, 0)), mode="edge")
    size = padded.shape[:2]
    # A spectral product, since a convolution with one kernel per example is slow on every backend.
    transfer = jnp.fft.rfft2(kernel, s=size)
    spectrum = jnp.fft.rfft2(padded, axes=(0, 1)) * transfer[..., None]
    result = jnp.fft.irfft2(spectrum, s=size, axes=(0, 1))
    return result[2 * _BLUR_REACH :, 2 * _BLUR_REACH :][:height, :width]


def _random_kernel(key: Key, settings: DegradationRound) -> jax.Array:
    """Index into _RESIZE_KERNELS."""
    if not settings.resize_random_kernel:
        return jnp.array(_RESIZE_KERNELS.index("bicubic"))
    return jax.random.randint(key, (), 0, len(_RESIZE_KERNELS))


def _random_resize(key: Key, image: jax.Array, settings: DegradationRound) -> tuple[jax.Array, jax.Array]:
    """Resize by a random factor.

    Shapes are static, so the result is in the top left corner of an image of the largest size, which repeats its last
    row and column; the second value is its height and width.
    """
    kernel_key, factor_key, side_key = jax.random.split(key, 3)
    least, largest = settings.resize
    # Down in 7 of 10 examples, up in 2, as in Real-ESRGAN; the factor is uniform on each side of 1.
    side = jax.random.uniform(side_key)
    end = jnp.where(side < 0.7, min(least, 1.0), jnp.where(side < 0.9, max(largest, 1.0), 1.0))
    factor = jnp.clip(1.0 + (end - 1.0) * jax.random.uniform(factor_key), least, largest)
    valid = jnp.maximum(jnp.round(factor * _whole(image)).astype(jnp.int32), 1)
    size = tuple(math.ceil(max(1.0, largest) * length) for length in image.shape[:2])
    return _resize(image, _whole(image), size, _random_kernel(kernel_key, settings), valid), valid


def _resize(
    image: jax.Array,
    valid: jax.Array,
    size: tuple[int, ...],
    kernel: jax.Array,
    new_valid: jax.Array | None = None,
) -> jax.Array:
    """Resize the top left `valid` pixels of [H,W,C] to the top left `new_valid` of [*size,C]; None for all of it."""
    target = jnp.array(size) if new_valid is None else new_valid
    rows = _resize_matrix(image.shape[0], valid[0], size[0], target[0], kernel)
    columns = _resize_matrix(image.shape[1], valid[1], size[1], target[1], kernel)
    image = jnp.einsum("ph,hwc->pwc", rows, image, precision=_EXACT)
    return jnp.einsum("qw,pwc->pqc", columns, image, precision=_EXACT)


def _resize_matrix(
    length: int, valid: jax.Array, new_length: int, new_valid: jax.Array, kernel: jax.Array
) -> jax.Array:
    """[new_length,length] weights of an anti-aliased resize; rows from `new_valid` on repeat the last one."""
    ratio = valid / new_valid
    row = jnp.minimum(jnp.arange(new_length), new_valid - 1)[:, None]
    column = jnp.arange(length)[None, :]
    center = (row + 0.5) * ratio - 0.5
    width = jnp.maximum(ratio, 1.0)
    distance = jnp.abs(column - center) / width
    half = 0.5 * ratio
    area = jnp.minimum(center + half, column + 0.5) - jnp.maximum(center - half, column - 0.5)
    cubic = jnp.where(
        distance < 1.0,
        (1.5 * distance - 2.5) * jnp.square(distance) + 1.0,
        ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0,
    )
    weights = jnp.stack(
        [
            jnp.maximum(area, 0.0),
            jnp.maximum(1.0 - distance, 0.0),
            jnp.where(distance < 2.0, cubic, 0.0),
        ]
    )[kernel]
    weights = jnp.where(column < valid, weights, 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _random_noise(key: Key, image: jax.Array, settings: DegradationRound) -> jax.Array:
    if not settings.noise_prob:
        return image
    used_key, sigma_key, gray_key, poisson_key, scale_key, normal_key = jax.random.split(key, 6)
    gray = jax.random.bernoulli(gray_key, settings.noise_gray_prob)
    normal = jax.random.normal(normal_key, image.shape)
    normal = jnp.where(gray, normal[..., :1], normal)
    noise = _uniform(sigma_key, settings.noise_sigma) * normal
    if settings.noise_poisson_prob:
        is_poisson = jax.random.bernoulli(poisson_key, settings.noise_poisson_prob)
        counts = jnp.clip(image, 0.0, 255.0)
        counts = jnp.where(gray, jnp.mean(counts, axis=-1, keepdims=True), counts)
        shot = _uniform(scale_key, settings.noise_poisson_scale) * (poisson(normal, counts) - counts)
        noise = jnp.where(is_poisson, shot, noise)
    used = jax.random.bernoulli(used_key, settings.noise_prob)
    return jnp.where(used, jnp.clip(image + noise, 0.0, 255.0), image)


def poisson(normal: jax.Array, mean: jax.Array) -> jax.Array:
    """Poisson counts of a given mean from standard normal values, by the inverse of Anscombe's transform.

    From a mean of 5 on, the mean is within 1 % and the variance within 5 %. Exact sampling is far slower.
    """
    return jnp.maximum(jnp.round(jnp.square(jnp.sqrt(mean) + 0.5 * normal) - 0.25), 0.0)


def _random_jpeg(key: Key, image: jax.Array, settings: DegradationRound) -> jax.Array:
    if not settings.jpeg_prob:
        return image
    used_key, quality_key, shift_key = jax.random.split(key, 3)
    # A crop of a photograph does not start where a block starts.
    down, right = jax.random.randint(shift_key, (2,), 0, 16)
    padded = jnp.pad(image, ((15, 0), (15, 0), (0, 0)), mode="edge")
    framed = jnp.pad(padded, ((0, 15), (0, 15), (0, 0)), mode="edge")
    shifted = jax.lax.dynamic_slice(framed, (15 - down, 15 - right, 0), padded.shape)
    coded = jpeg.compress(shifted, _uniform(quality_key, settings.jpeg_quality))
    coded = jax.lax.dynamic_slice(coded, (down, right, 0), image.shape)
    return jnp.where(jax.random.bernoulli(used_key, settings.jpeg_prob), coded, image)
