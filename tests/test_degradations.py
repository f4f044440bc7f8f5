"""Degradations against Pillow, NumPy and SciPy or by their moments; conditioning augmentation."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image as PillowImage

from sr3_jax import degradations
from sr3_jax.degradations import (
    PRESETS,
    ConditioningAugmentation,
    Degradation,
    DegradationRound,
    blur,
    poisson,
)
from sr3_jax.image_ops import degrade, to_uint8, to_unit


def images(batch: int = 3, side: int = 20, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


def test_blur_is_gaussian_with_one_sigma_per_example():
    x, sigmas = images(), np.array([0.4, 1.0, 1.7], np.float32)
    for image, sigma, found in zip(x, sigmas, blur(x, sigmas, reach=6), strict=True):
        taps = np.exp(-0.5 * (np.arange(-6, 7) / sigma) ** 2)
        taps /= taps.sum()
        padded = np.pad(image, ((6, 6), (6, 6), (0, 0)), mode="edge")
        rows = sum(tap * padded[k : k + 20] for k, tap in enumerate(taps))
        expected = sum(tap * rows[:, k : k + 20] for k, tap in enumerate(taps))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_strength_zero_changes_no_bit(kind):
    x = images()
    same = ConditioningAugmentation(kind, 0.9).apply(jax.random.key(0), x, jnp.zeros(3))
    np.testing.assert_array_equal(same, x)


def test_noise_preserves_variance_and_has_the_given_strength():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 128, 128, 3)), jnp.float32)
    strength = jnp.array([0.5, 1.0])
    noisy = ConditioningAugmentation("noise", 0.8).apply(jax.random.key(1), x, strength)
    np.testing.assert_allclose(jnp.std(noisy, axis=(1, 2, 3)), 1.0, atol=0.02)
    for row, level in enumerate((0.4, 0.8)):
        np.testing.assert_allclose(jnp.mean(noisy[row] * x[row]), np.sqrt(1 - level**2), atol=0.02)


def test_per_example_keys_make_examples_independent_of_the_batch():
    x, augmentation = images(), ConditioningAugmentation("noise", 0.5)
    keys = jax.random.split(jax.random.key(3), 3)
    together = augmentation.apply(keys, x, jnp.ones(3))
    single = augmentation.apply(jax.random.clone(keys)[1:2], x[1:2], jnp.ones(1))
    np.testing.assert_array_equal(together[1:2], single)


def test_fraction_of_examples_is_augmented_with_uniform_strengths():
    x = jnp.zeros((4000, 1, 1, 1))
    out, strength = ConditioningAugmentation("noise", 1.0, share=0.3).sample(jax.random.key(5), x)
    chosen = np.asarray(strength) > 0
    assert abs(chosen.mean() - 0.3) < 0.03
    np.testing.assert_array_equal(np.asarray(out)[:, 0, 0, 0] != 0, chosen)
    quartiles = np.quantile(np.asarray(strength)[chosen], (0.25, 0.5, 0.75))
    np.testing.assert_allclose(quartiles, (0.25, 0.5, 0.75), atol=0.05)


# ---- Blur, resizing, noise and JPEG


@pytest.mark.parametrize(("index", "filter"), [(1, PillowImage.BILINEAR), (2, PillowImage.BICUBIC)])
@pytest.mark.parametrize("side", [9, 20, 33])
def test_resizing_equals_pillow_for_any_size(index, filter, side):
    image = (images(1)[0] + 1) * 127.5
    planes = [PillowImage.fromarray(image[..., c]).resize((side, side), filter) for c in range(3)]
    expected = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    canvas = jnp.pad(
        jnp.asarray(image), ((0, 5), (0, 5), (0, 0)), constant_values=1e6
    )  # not part of the image
    valid, new_valid = jnp.array([20, 20]), jnp.array([side, side])
    found = np.asarray(degradations._resize(canvas, valid, (40, 40), jnp.array(index), new_valid))
    np.testing.assert_allclose(found[:side, :side], expected, atol=1e-2)
    np.testing.assert_allclose(found[side:, :side], np.repeat(found[side - 1 : side, :side], 40 - side, 0))


def test_area_resizing_averages_over_the_area_of_a_pixel():
    image = images(1)[0]
    found = degradations._resize(jnp.asarray(image), jnp.array([20, 20]), (8, 8), jnp.array(0))
    fine = np.repeat(np.repeat(image, 2, 0), 2, 1)  # 40 = 8 * 5
    np.testing.assert_allclose(found, fine.reshape(8, 5, 8, 5, 3).mean((1, 3)), atol=1e-5)


def test_filter_is_a_convolution_with_edge_padding():
    image, rng = images(1)[0], np.random.default_rng(2)
    kernel = rng.uniform(size=(21, 21))
    kernel = (kernel + kernel[::-1, ::-1]) / (2 * kernel.sum())
    padded = np.pad(image, ((10, 10), (10, 10), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (21, 21), axis=(0, 1))
    expected = np.einsum("hwcij,ij->hwc", windows, kernel)
    found = degradations._filter(jnp.asarray(image), jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cutoff", [1.1, 2.0, 3.1])
def test_sinc_kernel_is_the_circular_low_pass_filter(cutoff):
    radius = np.hypot(*np.mgrid[-10:11, -10:11])
    radius[10, 10] = 1
    expected = cutoff * scipy.special.j1(cutoff * radius) / (2 * np.pi * radius)
    expected[10, 10] = cutoff**2 / (4 * np.pi)
    kernel = degradations._sinc_kernel(jnp.float32(cutoff))
    np.testing.assert_allclose(kernel, expected / expected.sum(), atol=1e-5)


def test_gaussian_kernels_have_the_drawn_widths():
    settings = DegradationRound(blur_sigma=(0.8, 2.0), blur_anisotropic_prob=1.0)
    y, x = np.mgrid[-10:11, -10:11]
    for number in range(5):
        kernel = np.asarray(degradations._blur_kernel(jax.random.key(number), settings))
        covariance = np.array([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)])
        assert kernel.sum() == pytest.approx(1)
        widths = np.sqrt(np.linalg.eigvalsh(covariance))
        assert 0.75 < widths[0] < widths[1] < 2.05


@pytest.mark.parametrize("mean", [5, 20, 250])
def test_poisson_counts_have_equal_mean_and_variance(mean):
    counts = np.asarray(poisson(jax.random.normal(jax.random.key(0), (200_000,)), jnp.float32(mean)))
    assert np.all(counts == np.round(counts)) and counts.min() >= 0
    assert counts.mean() == pytest.approx(mean, rel=0.01) and counts.var() == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize(("gray", "poisson_prob"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_noise_has_the_strength_of_its_settings(gray, poisson_prob):
    settings = DegradationRound(
        noise_prob=1.0,
        noise_sigma=(8.0, 8.0),
        noise_gray_prob=gray,
        noise_poisson_prob=poisson_prob,
        noise_poisson_scale=(0.5, 0.5),
    )
    image = jnp.full((128, 128, 3), 100.0)
    noise = np.asarray(degradations._random_noise(jax.random.key(1), image, settings) - image)
    assert noise.std() == pytest.approx(5.0 if poisson_prob else 8.0, rel=0.03)
    assert np.all(noise[..., 0] == noise[..., 1]) == bool(gray)


def test_clean_degradation_is_the_bicubic_of_the_paper():
    x = images(2, 24)
    np.testing.assert_array_equal(PRESETS["clean"].apply(jax.random.key(0), x, 4), degrade(x, 4))


@pytest.mark.parametrize("name", ["photo", "wild"])
def test_degraded_example_depends_on_its_own_key_only(name):
    x, apply = images(3, 32), jax.jit(lambda keys, x: PRESETS[name].apply(keys, x, 4))
    together = np.asarray(apply(jax.random.split(jax.random.key(0), 3), x))
    assert together.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(to_unit(to_uint8(together)), together)  # whole levels
    rolled = apply(jax.random.split(jax.random.key(0), 3)[jnp.array([2, 0, 1])], np.roll(x, 1, axis=0))
    np.testing.assert_array_equal(rolled, np.roll(together, 1, axis=0))
    assert np.any(together != apply(jax.random.split(jax.random.key(1), 3), x))


@pytest.mark.parametrize("name", ["photo", "wild"])
def test_degradation_does_not_shift_the_image(name):
    """Any shift between the low-res image and its target would be learned as a blur."""
    preset = PRESETS[name]
    quiet = Degradation(replace(preset.first, noise_prob=0.0), replace(preset.second, noise_prob=0.0))
    rows, columns = np.mgrid[:64, :64]
    spot = np.exp(-((rows - 27.5) ** 2 + (columns - 35.5) ** 2) / 128)
    x = np.broadcast_to(2 * spot[None, :, :, None] - 1, (16, 64, 64, 3)).astype(np.float32)
    small = np.asarray(quiet.apply(jax.random.key(2), x, 4))[..., 1] + 1
    mass = small.sum((1, 2))
    center = [(small.sum(3 - axis) * np.arange(16)).sum(1) / mass for axis in (1, 2)]
    np.testing.assert_allclose(np.mean(center, axis=1), [6.5, 8.5], atol=0.06)


def test_fraction_of_examples_is_compressed():
    x = np.repeat(images(1, 16), 400, axis=0)
    out = Degradation(DegradationRound(jpeg_prob=0.3)).apply(jax.random.key(4), x, 4)
    changed = np.any(np.asarray(out) != np.asarray(degrade(x[:1], 4)), axis=(1, 2, 3))
    assert abs(changed.mean() - 0.3) < 0.07
