"""Conditioning augmentation: blur against NumPy, noise by its moments, strength 0 bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.degradations import ConditioningAugmentation, blur


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
