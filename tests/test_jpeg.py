"""JPEG compression on the device against Pillow's encoder and decoder."""

from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sr3_jax import jpeg
from sr3_jax.data.sources import open_source


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return open_source("photos:test")[0]["image"][:203, :149]  # no whole blocks


def pillow(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("quality", [5, 30, 50, 75, 90, 100])
def test_equals_pillow_within_rounding(photo, quality):
    """libjpeg's transforms are in whole numbers, so a few coefficients round to the other side."""
    ours = np.asarray(jpeg.compress(jnp.asarray(photo, jnp.float32), jnp.float32(quality)))
    theirs = pillow(photo, quality).astype(float)
    off = np.abs(ours - theirs)
    assert off.mean() < 0.5 and np.mean(off > 1) < 0.15
    if quality < 100:
        assert off.mean() < 0.2 * np.abs(theirs - photo).mean()
    assert ours.min() >= 0 and ours.max() <= 255 and np.all(ours == np.round(ours))


def test_flat_gray_image_is_unchanged():
    flat = jnp.full((20, 20, 3), 90.0)
    np.testing.assert_array_equal(jpeg.compress(flat, jnp.float32(75)), flat)
