"""Metrics against scikit-image, float64 and Pillow, and the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as PillowImage
from skimage.metrics import structural_similarity

from sr3_jax import image_ops, metrics


def pair(seed, *shape, spread=30):
    """An image with smooth and textured regions, and a degraded copy: uint8 [B,H,W,C] each."""
    random = np.random.default_rng(seed)
    batch, height, width, channels = shape
    ramp = np.linspace(0, 200, width)[None, None, :, None] * np.ones((batch, height, 1, channels))
    a = ramp + random.integers(0, 56, shape) * (np.arange(height) % 7 > 2)[None, :, None, None]
    b = a + random.integers(-spread, spread + 1, shape) + 3
    return np.clip(a, 0, 255).astype(np.uint8), np.clip(b, 0, 255).astype(np.uint8)


def psnr64(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def ssim64(a, b, channel_axis=-1):
    return structural_similarity(
        a,
        b,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=channel_axis,
    )


@pytest.mark.parametrize("spread", [0, 1, 30, 250])
def test_psnr_of_large_images_is_precise(spread):
    a, b = pair(0, 1, 768, 1024, 3, spread=spread)
    np.testing.assert_allclose(metrics.psnr(a, b), [psnr64(a, b)], atol=1e-4, rtol=0)


def test_psnr_is_zero_for_black_and_white_and_infinite_for_a_copy():
    black, white = np.zeros((1, 300, 400, 3), np.uint8), np.full((1, 300, 400, 3), 255, np.uint8)
    np.testing.assert_allclose(metrics.psnr(black, white), [0.0], atol=1e-5)
    assert np.isposinf(metrics.psnr(white, white)).all()


def test_every_metric_is_per_example():
    a, b = pair(1, 3, 24, 32, 3)
    b[1] = a[1]
    low_res = np.asarray(image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(a), 4)))
    for metric, other in [
        (metrics.psnr, b),
        (metrics.ssim, b),
        (lambda x, y: metrics.psnr_luma(x, y, crop=4), b),
        (lambda x, y: metrics.ssim_luma(x, y, crop=4), b),
        (metrics.consistency, low_res),
        (metrics.mean_color_error, low_res),
    ]:
        whole = metric(a, other)
        assert whole.shape == (3,) and whole.dtype == jnp.float32
        single = jnp.concatenate([metric(a[i : i + 1], other[i : i + 1]) for i in range(3)])
        np.testing.assert_allclose(whole, single, rtol=1e-5)
        assert len(set(np.asarray(whole).tolist())) == 3


@pytest.mark.parametrize("shape", [(2, 37, 91, 3), (1, 11, 11, 3), (1, 64, 48, 1)])
def test_ssim_equals_scikit_image(shape):
    a, b = pair(2, *shape)
    np.testing.assert_allclose(
        metrics.ssim(a, b), [ssim64(x, y) for x, y in zip(a, b, strict=True)], atol=1e-4
    )


@pytest.mark.parametrize("level", [0, 128, 250])
def test_ssim_of_flat_images_is_precise(level):
    a = np.full((1, 16, 16, 3), level, np.uint8)
    b = a + np.random.default_rng(3).integers(0, 4, a.shape, dtype=np.uint8)
    np.testing.assert_allclose(metrics.ssim(a, b), [ssim64(a[0], b[0])], atol=1e-5)
    np.testing.assert_allclose(metrics.ssim(a, a), [1.0], atol=1e-6)


def luma64(rgb):
    """BT.601: weights .299, .587, .114; studio range 16..235, as in MATLAB's rgb2ycbcr before rounding."""
    return 16 + 219 * (rgb.astype(np.float64) / 255) @ np.array([0.299, 0.587, 0.114])


def test_luma_metrics_use_bt601_without_the_border():
    a, b = pair(4, 2, 40, 52, 3)
    b[:, :4] = 0  # the border is ignored
    inside = np.s_[4:-4, 4:-4]
    lumas = [(luma64(x)[inside], luma64(y)[inside]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.psnr_luma(a, b, crop=4), [psnr64(x, y) for x, y in lumas], atol=1e-4)
    ssims = [ssim64(x, y, channel_axis=None) for x, y in lumas]
    np.testing.assert_allclose(metrics.ssim_luma(a, b, crop=4), ssims, atol=1e-4)
    # The known values of the standard: black 16, white 235, pure green 144.55.
    colors = np.array([[[[0, 0, 0], [255, 255, 255], [0, 255, 0]]]], np.uint8)
    np.testing.assert_allclose(metrics._luma(colors, 0)[0, 0, :, 0], [16, 235, 144.553], atol=1e-3)


def test_consistency_is_the_error_after_bicubic_downsampling():
    output, _ = pair(5, 1, 64, 96, 3)
    low_res = np.random.default_rng(5).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    channels = [PillowImage.fromarray(output[0, ..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((24, 16), PillowImage.Resampling.BICUBIC)) for c in channels]
    shrunk = np.clip(np.stack(resized, axis=-1).astype(np.float64), 0, 255)
    expected = 1e5 * np.mean(((shrunk - low_res[0]) / 255) ** 2)
    np.testing.assert_allclose(metrics.consistency(output, low_res), [expected], rtol=1e-4)


def test_consistency_of_the_ground_truth_is_the_rounding_of_low_res():
    """Ties the metric to the bicubic that makes low_res: another kernel would give hundreds."""
    ground_truth = np.random.default_rng(6).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    low_res = image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(ground_truth), 4))
    rounding = 1e5 / 12 / 255**2  # the variance of a uniform error of one level: 0.128
    np.testing.assert_allclose(metrics.consistency(ground_truth, low_res), rounding, rtol=0.1)


def test_consistency_ignores_overshoot_outside_the_range_of_an_image():
    stripes = np.tile(np.repeat([0, 255], 12).astype(np.uint8), 2)
    ground_truth = np.ascontiguousarray(np.broadcast_to(stripes[None, None, :, None], (1, 16, 48, 3)))
    low_res = image_ops.to_uint8(image_ops.degrade(image_ops.to_unit(ground_truth), 4))
    assert float(metrics.consistency(ground_truth, low_res)[0]) < 0.2


def test_mean_color_error_is_that_of_the_worst_channel():
    low_res = np.full((1, 8, 8, 3), 100, np.uint8)
    output = np.full((1, 32, 32, 3), 100, np.uint8)
    output[..., 2] = 97
    output[:, :16, :, 1] = 102
    np.testing.assert_allclose(metrics.mean_color_error(output, low_res), [3.0], atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: metrics.psnr(a, a[:, 1:]), "same shape"),
        (lambda a: metrics.psnr(a / 255, a / 255), "uint8"),
        (lambda a: metrics.ssim(a[:, :10], a[:, :10]), "at least 11x11 pixels, got 10x16"),
        (lambda a: metrics.ssim_luma(a, a, crop=3), "at least 11x11 pixels, got 10x10"),
        (lambda a: metrics.psnr_luma(a, a, crop=8), "crop=8"),
        (lambda a: metrics.psnr_luma(a[..., :1], a[..., :1], crop=0), "3 channels"),
        (lambda a: metrics.consistency(a, a[:, :5, :5]), "multiple"),
        (lambda a: metrics.consistency(a, a[:, :8, :4]), "multiple"),
        (lambda a: metrics.mean_color_error(a[:, :4, :4], a), "multiple"),
    ],
)
def test_invalid_arguments_fail(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.zeros((1, 16, 16, 3), np.uint8))


def test_metrics_work_inside_jit():
    a, b = pair(7, 2, 16, 16, 3)
    inside = jax.jit(lambda x, y: metrics.psnr(x, y) + metrics.ssim(x, y))(a, b)
    np.testing.assert_allclose(inside, metrics.psnr(a, b) + metrics.ssim(a, b), rtol=1e-6)


def test_registry_formats_values_and_knows_directions():
    psnr, seconds = metrics.METRICS["psnr"], metrics.METRICS["seconds"]
    assert psnr.format(20.126) == "20.13" and psnr.format(None) == psnr.format(np.inf) == "inf"
    assert psnr.format(1.5, signed=True) == "+1.50" and psnr.format(-1.5, signed=True) == "-1.50"
    assert seconds.format(0.00123) == "0.00123" and seconds.format(123.4) == "123"
    assert psnr.higher_is_better and not metrics.METRICS["lpips"].higher_is_better
    assert all(key == metric.key for key, metric in metrics.METRICS.items())
    headings = [metric.heading for metric in metrics.METRICS.values()]
    assert len(set(headings)) == len(headings)


def test_every_searchable_metric_has_a_direction():
    found = [metrics.search_metric(name) for name in metrics.SEARCH_METRICS]
    assert all(metric.higher_is_better is not None for metric in found)
    assert metrics.search_metric("frechet").key == "frechet_alexnet"
