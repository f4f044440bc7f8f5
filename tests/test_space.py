"""Both spaces: encode and decode are inverse, clip projects onto images in [-1,1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion.space import image, residual

SHAPE = (3, 4, 5, 3)
SPACES = {"image": image(), "residual": residual(8.0)}


def values(seed: int, bound: float) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), SHAPE, minval=-bound, maxval=bound)


def condition() -> dict[str, jax.Array]:
    """An upsampled image that overshoots [-1,1], as bicubic does at edges."""
    return {"upsampled": values(9, 1.2)}


@pytest.mark.parametrize("name", SPACES)
def test_encode_and_decode_are_inverse(name):
    space, cond = SPACES[name], condition()
    y, z = values(0, 1.0), values(1, 3.0)
    np.testing.assert_allclose(space.decode(space.encode(y, cond), cond), y, atol=1e-6)
    np.testing.assert_allclose(space.encode(space.decode(z, cond), cond), z, atol=1e-5)


def test_image_space_maps_images_to_themselves():
    y = values(0, 1.0)
    np.testing.assert_array_equal(image().encode(y, {}), y)


def test_residual_is_scaled_and_signed():
    """z = scale * (image - upsampled), so it is 0 where the upsampled image is right."""
    cond = condition()
    np.testing.assert_array_equal(residual(8.0).encode(cond["upsampled"], cond), np.zeros(SHAPE))
    np.testing.assert_allclose(
        residual(8.0).encode(cond["upsampled"] + 0.25, cond), np.full(SHAPE, 2.0), rtol=1e-5
    )


@pytest.mark.parametrize("name", SPACES)
def test_clip_is_the_nearest_point_with_an_image_in_range(name):
    space, cond = SPACES[name], condition()
    z = values(1, 30.0)
    clipped = space.clip(z, cond)
    nearest = space.encode(jnp.clip(space.decode(z, cond), -1.0, 1.0), cond)
    np.testing.assert_allclose(clipped, nearest, atol=2e-5)
    decoded = np.asarray(space.decode(clipped, cond))
    assert decoded.min() >= -1 - 1e-6 and decoded.max() <= 1 + 1e-6
    np.testing.assert_allclose([decoded.min(), decoded.max()], [-1, 1], atol=1e-6)  # both bounds are reached


@pytest.mark.parametrize("name", SPACES)
def test_clip_is_a_projection(name):
    space, cond = SPACES[name], condition()
    inside = space.encode(values(2, 0.999), cond)
    np.testing.assert_array_equal(space.clip(inside, cond), inside)
    once = space.clip(values(1, 30.0), cond)
    np.testing.assert_array_equal(space.clip(once, cond), once)


@pytest.mark.parametrize("scale", [0.0, -2.0, float("nan")])
def test_invalid_residual_scale_fails(scale):
    with pytest.raises(ValueError, match="scale must be above 0, got"):
        residual(scale)
