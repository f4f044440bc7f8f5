"""Tiles: how an image is divided, and noise by position."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.errors import UserError
from sr3_jax.inference.tiling import HALO, bucket, divide, position_noise, tile_image

PHOTO_4X = {"stride": 8, "scale": 4, "exact": 36}


@pytest.mark.parametrize("length", [73, 74, 100, 260, 289, 290, 513, 1000, 3001, 10_000])
@pytest.mark.parametrize("most", [72, 100, 288])
def test_each_tile_contributes_only_pixels_away_from_its_inner_borders(length, most):
    padded = bucket(length, 2)
    if padded <= most:
        return
    axis = divide(length, padded=padded, most=most, align=16)
    assert axis.size <= most and axis.starts[0] == 0 and axis.starts[-1] + axis.size == padded
    assert axis.edges[0] == 0 and axis.edges[-1] == length and list(axis.edges) == sorted(axis.edges)
    assert all(start % 16 == 0 for start in axis.starts)
    for index, (first, last) in enumerate(itertools.pairwise(axis.edges)):
        if index > 0:
            assert first >= axis.starts[index] + HALO or first == last
        if index < len(axis.starts) - 1:
            assert last <= axis.starts[index] + axis.size - HALO


@pytest.mark.parametrize(("side", "cost"), [(260, 1.1), (300, 1.6), (1000, 1.5), (4000, 1.35)])
def test_tiles_cover_little_more_than_the_image(side, cost):
    """260x260 was once computed 3.9 times over."""
    plan = tile_image(side, side, most=256, **PHOTO_4X)
    assert plan.count * plan.rows.size * plan.columns.size / side**2 <= cost


def test_crops_and_inner_parts_put_an_image_together_again():
    image = np.random.default_rng(0).integers(0, 256, (150, 211, 3), dtype=np.uint8)
    plan = tile_image(150, 211, most=72, **PHOTO_4X)
    assert plan.count > 4
    bands = [
        np.concatenate(
            [plan.inner(np.repeat(np.repeat(plan.crop(image, t), 2, 0), 2, 1), t, 2) for t in band], axis=1
        )
        for band in plan.bands()
    ]
    np.testing.assert_array_equal(np.concatenate(bands), np.repeat(np.repeat(image, 2, 0), 2, 1))


def test_tile_without_room_for_its_halo_fails():
    with pytest.raises(UserError, match=r"tile must be at least 64 .*got 63"):
        tile_image(500, 500, most=63, **PHOTO_4X)


def test_noise_of_a_pixel_depends_only_on_its_position():
    whole = position_noise(jax.random.key(0), jnp.array([0, 0]), shape=(48, 64, 3), cell=16)
    part = position_noise(jax.random.key(0), jnp.array([1, 2]), shape=(20, 30, 3), cell=16)
    np.testing.assert_array_equal(part, whole[16:36, 32:62])


def test_noise_by_position_is_standard_normal_and_uncorrelated():
    noise = np.asarray(position_noise(jax.random.key(1), jnp.array([3, 5]), shape=(256, 256, 3), cell=16))
    assert abs(noise.mean()) < 0.01 and noise.std() == pytest.approx(1, abs=0.01)
    for shift in ((0, 1), (1, 0), (16, 0), (0, 16)):  # neighbors, also across cells
        assert abs(np.mean(noise * np.roll(noise, shift, axis=(0, 1)))) < 0.01
