"""Image operations, compared with Pillow and with exact arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as PillowImage

from sr3_jax import image_ops


def pillow_bicubic(x, height, width):
    """Resize float32 [H,W,C] to [height,width,C] with Pillow's float mode, one channel at a time."""
    resized = [
        PillowImage.fromarray(np.ascontiguousarray(x[..., c])).resize(
            (width, height), PillowImage.Resampling.BICUBIC
        )
        for c in range(x.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def noise(seed, *shape):
    """Uniform noise, the hardest image for a resampler."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_to_unit_and_to_uint8_are_inverse_on_all_levels():
    levels = np.arange(256, dtype=np.uint8)
    unit = image_ops.to_unit(levels)
    assert unit.dtype == jnp.float32
    assert unit[0] == -1.0 and unit[255] == 1.0
    np.testing.assert_array_equal(image_ops.to_uint8(unit), levels)


def test_to_uint8_clips_and_rounds_to_nearest():
    level = 2 / 255
    x = jnp.array([-3.0, -1 + 0.4 * level, -1 + 0.6 * level, 1 - 0.6 * level, 1 - 0.4 * level, 7.0])
    np.testing.assert_array_equal(image_ops.to_uint8(x), [0, 0, 1, 254, 255, 255])


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((64, 64), (16, 16)),
        ((16, 16), (64, 64)),
        ((37, 91), (148, 364)),
        ((148, 364), (37, 91)),
        ((37, 91), (50, 13)),
        ((5, 100), (33, 99)),
        ((1, 9), (4, 36)),
        ((1, 1), (4, 4)),
        ((12, 1024), (12, 256)),
        ((2, 20_000), (8, 80_000)),
        ((2, 20_000), (2, 6_007)),
    ],
)
def test_bicubic_matches_pillow(size, target):
    image = noise(0, 2, *size, 3)
    ours = jax.jit(image_ops.resize_bicubic, static_argnums=(1, 2))(image_ops.to_unit(image), *target)
    assert ours.shape == (2, *target, 3) and ours.dtype == jnp.float32
    theirs = np.stack([pillow_bicubic(p.astype(np.float32), *target) for p in image])
    np.testing.assert_allclose((np.asarray(ours) + 1) * 127.5, theirs, atol=0.01, rtol=0)


@pytest.mark.parametrize("target", [(4, 80_000), (1, 5_000)])
def test_bicubic_needs_memory_for_the_pixels_only(target):
    """Not for a weight per pair of an input and an output pixel: that is 6.4 GB here."""
    x = jax.ShapeDtypeStruct((1, 1, 20_000, 3), jnp.float32)
    compiled = jax.jit(image_ops.resize_bicubic, static_argnums=(1, 2)).lower(x, *target).compile()
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    assert total < 20 * 2**20


def test_bicubic_keeps_overshoot_and_constant_images():
    edge = jnp.concatenate([jnp.full((1, 8, 4, 1), -1.0), jnp.full((1, 8, 4, 1), 1.0)], axis=2)
    assert float(jnp.max(image_ops.upsample(edge, 4))) > 1.05
    flat = jnp.full((1, 9, 7, 3), 0.3)
    np.testing.assert_allclose(image_ops.resize_bicubic(flat, 31, 5), 0.3, atol=1e-6)


def test_bicubic_computes_in_float32_for_any_dtype():
    x = image_ops.to_unit(noise(1, 1, 16, 16, 3)).astype(jnp.bfloat16)
    ours = image_ops.resize_bicubic(x, 64, 64)
    assert ours.dtype == jnp.float32
    theirs = pillow_bicubic(np.asarray(x[0], np.float32), 64, 64)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "size", "text"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), (2, 2), "uint8"),
        (np.zeros((4, 4, 3), np.float32), (2, 2), r"\[B,H,W,C\]"),
        (np.zeros((1, 4, 4, 3), np.float32), (0, 2), "0x2"),
    ],
)
def test_bicubic_rejects_invalid_input(x, size, text):
    with pytest.raises(ValueError, match=text):
        image_ops.resize_bicubic(x, *size)


def test_degrade_matches_an_image_saved_by_pillow():
    image = noise(2, 2, 32, 48, 3)
    low_res = jax.jit(image_ops.degrade, static_argnums=1)(image_ops.to_unit(image), 4)
    theirs = np.stack([pillow_bicubic(p.astype(np.float32), 8, 12) for p in image])
    np.testing.assert_array_equal(image_ops.to_uint8(low_res), np.clip(np.round(theirs), 0, 255))
    # Exactly on the uint8 levels, so that training and image files give the same floats.
    np.testing.assert_array_equal(low_res, image_ops.to_unit(image_ops.to_uint8(low_res)))


def test_degrade_clips_overshoot():
    stripes = np.tile(np.repeat([0, 255], 12).astype(np.uint8), 2)
    x = image_ops.to_unit(np.broadcast_to(stripes[None, None, :, None], (1, 8, 48, 3)))
    assert float(jnp.max(image_ops.resize_bicubic(x, 2, 12))) > 1.0
    low_res = image_ops.degrade(x, 4)
    assert float(jnp.max(low_res)) == 1.0 and float(jnp.min(low_res)) == -1.0


def test_degrade_rejects_indivisible_sizes():
    with pytest.raises(ValueError, match=r"30x32 .*scale 4"):
        image_ops.degrade(jnp.zeros((1, 30, 32, 3)), 4)


def test_upsample_restores_the_size():
    assert image_ops.upsample(jnp.zeros((2, 5, 7, 3)), 4).shape == (2, 20, 28, 3)


def test_padding_repeats_the_bottom_and_right_edges():
    x = noise(3, 2, 5, 8, 3)
    padded = image_ops.pad_image(x, 8, 8)
    assert padded.shape == (2, 8, 8, 3) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[:, :5], x)
    np.testing.assert_array_equal(padded[:, 5:], np.broadcast_to(x[:, 4:5], (2, 3, 8, 3)))
    assert image_ops.pad_image(x, 5, 8).shape == x.shape


def test_batch_is_padded_with_its_last_element():
    x = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(image_ops.pad_batch(x, 5), x[[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(image_ops.pad_batch(x, 3), x)


def test_back_projection_makes_an_image_consistent_with_its_low_res_image():
    rng = np.random.default_rng(0)
    low_res = image_ops.degrade(rng.uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32), 4)
    image = image_ops.upsample(low_res, 4) + 0.1 * rng.standard_normal((2, 32, 48, 3)).astype(np.float32)

    def off(x) -> float:
        return float(jnp.sqrt(jnp.mean(jnp.square(image_ops.resize_bicubic(x, 8, 12) - low_res))))

    errors = [off(image_ops.back_project(image, low_res, 4, rounds=rounds)) for rounds in range(4)]
    assert errors[0] > 0.02 and errors[3] < errors[0] / 5
    assert errors == sorted(errors, reverse=True)
    consistent = image_ops.upsample(jnp.zeros_like(low_res), 4)
    np.testing.assert_allclose(
        image_ops.back_project(consistent, jnp.zeros_like(low_res), 4, rounds=3), 0.0, atol=1e-6
    )


def test_bilinear_upsampling_interpolates_between_pixel_centers():
    low_res = np.random.default_rng(0).uniform(-1, 1, (1, 3, 5, 2)).astype(np.float32)
    rows, columns = ((np.arange(4 * side) + 0.5) / 4 - 0.5 for side in (3, 5))
    wanted = np.apply_along_axis(lambda line: np.interp(rows, np.arange(3), line), 1, low_res)
    wanted = np.apply_along_axis(lambda line: np.interp(columns, np.arange(5), line), 2, wanted)
    np.testing.assert_allclose(image_ops.upsample(low_res, 4, "bilinear"), wanted, atol=1e-6)
