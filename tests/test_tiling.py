"""Tiled against untiled denoisers with known receptive fields.

Shape legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.inference import tiling
from sr3_jax.inference.tiling import tiled

GAMMA = np.array([0.3, 0.8], np.float32)


def image(height: int, width: int, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, height, width, 3)), jnp.float32)


def inputs(height: int, width: int):
    return image(height, width), jnp.asarray(GAMMA), {"upsampled": image(height, width, seed=1)}


def pointwise(y_t, gamma, cond):
    """Each output pixel depends on the same pixel of every input."""
    return jnp.tanh(y_t) * gamma[:, None, None, None] + cond["upsampled"]


def blurred(y_t, gamma, cond):
    """A 5x5 mean with zero padding, like a convolution of reach 2."""
    total = jax.lax.reduce_window(
        y_t + cond["upsampled"], 0.0, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "SAME"
    )
    return total / 25


def in_blocks(y_t, gamma, cond):
    """Each 4x4 block becomes its first pixel, like a network with patch 4."""
    return jnp.repeat(jnp.repeat(y_t[:, ::4, ::4], 4, 1), 4, 2)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (16, 44), (100, 16), (17, 33)])
def test_tiling_does_not_change_a_pointwise_denoiser(height, width):
    given = inputs(height, width)
    np.testing.assert_allclose(
        tiled(pointwise, tile=16, overlap=6)(*given), pointwise(*given), rtol=1e-5, atol=1e-6
    )


def test_tiling_changes_a_local_denoiser_only_near_tile_edges():
    given = inputs(40, 64)
    out, whole = tiled(blurred, tile=16, overlap=8)(*given), blurred(*given)
    far = np.ones((40, 64), bool)
    for axis, side in enumerate((40, 64)):
        starts = tiling._starts(side, 16, 8, 1)
        for edge in (*starts[1:], *(start + 16 for start in starts[:-1])):
            near = np.abs(np.arange(side) - edge + 0.5) < 2
            far &= ~(near[:, None] if axis == 0 else near[None, :])
    assert far.mean() > 0.15
    np.testing.assert_allclose(np.asarray(out)[:, far], np.asarray(whole)[:, far], atol=1e-5)
    assert np.abs(out - whole).max() > 1e-3  # otherwise the comparison would prove nothing


def test_tiles_start_at_multiples_of_the_stride():
    given = inputs(40, 60)
    out = tiled(in_blocks, tile=16, overlap=6, stride=4)(*given)
    np.testing.assert_allclose(out, in_blocks(*given), rtol=1e-5, atol=1e-6)


def test_different_predictions_of_tiles_are_blended():
    """Each tile predicts its mean, which would leave visible seams without blending."""
    y_t, gamma, cond = inputs(16, 64)
    ramp = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, 64)[None, None, :, None], y_t.shape)

    def mean(y_t, gamma, cond):
        return jnp.broadcast_to(y_t.mean((1, 2), keepdims=True), y_t.shape)

    out = np.asarray(tiled(mean, tile=16, overlap=8)(ramp, gamma, cond))[0, 0, :, 0]
    between_tiles = 8 * 2 / 63  # tiles start every 8 pixels of the ramp
    assert out[-1] - out[0] == pytest.approx(6 * between_tiles, rel=1e-4)
    assert np.diff(out).max() < between_tiles / 4


def test_network_gets_equal_tiles_of_image_and_condition():
    seen = []

    def spy(y_t, gamma, cond):
        seen.append((y_t.shape, cond["upsampled"].shape, gamma.shape, cond["label"].shape))
        return y_t

    y_t, gamma, cond = inputs(40, 64)
    tiled(spy, tile=16, overlap=4)(y_t, gamma, cond | {"label": jnp.arange(2)})
    assert set(seen) == {((2, 16, 16, 3), (2, 16, 16, 3), (2,), (2,))}
    seen.clear()
    tiled(spy, tile=48, overlap=4)(y_t, gamma, cond | {"label": jnp.arange(2)})
    assert set(seen) == {((2, 40, 48, 3), (2, 40, 48, 3), (2,), (2,))}


def test_image_within_one_tile_is_passed_through():
    given = inputs(16, 12)
    np.testing.assert_array_equal(tiled(blurred, tile=16, overlap=4)(*given), blurred(*given))


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_tiles_cover_every_side_with_the_minimum_count(stride):
    tile, overlap = 64, 16
    for side in range(tile + stride, 400, stride):
        starts = tiling._starts(side, tile, overlap, stride)
        assert starts[0] == 0 and starts[-1] == side - tile
        assert all(start % stride == 0 for start in starts)
        assert max(np.diff(starts)) <= tile - overlap
        assert len(starts) == 1 + -(-(side - tile) // (tile - overlap))


@pytest.mark.parametrize("options", [{"overlap": 16}, {"overlap": -1}, {"overlap": 13, "stride": 4}])
def test_invalid_overlap_fails(options):
    with pytest.raises(ValueError, match=f"overlap must be .* got {options['overlap']}"):
        tiled(pointwise, tile=16, **options)


def test_tile_that_is_not_a_multiple_of_the_stride_fails():
    with pytest.raises(ValueError, match=r"tile must .*8, got 20"):
        tiled(pointwise, tile=20, overlap=4, stride=8)
