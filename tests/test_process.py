"""The forward process and its posterior against independent computations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion.process import PREDICTIONS, diffuse, posterior, target, to_eps, to_y0
from sr3_jax.diffusion.schedule import linear, respace

SHAPE = (5, 2, 3, 4)
GAMMAS = np.array([0.999999, 0.97, 0.5, 0.03, 4.39e-5])  # [B], clean to noise


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def pair(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """(y0, eps), [B,H,W,C] float64."""
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.uniform(-1, 1, SHAPE)), jnp.asarray(generator.normal(size=SHAPE))


def test_diffuse_is_equation_3_with_each_examples_own_gamma():
    y0, eps = pair()
    y = diffuse(y0, eps, jnp.asarray(GAMMAS))
    for example, gamma in enumerate(GAMMAS):
        expected = gamma**0.5 * np.asarray(y0[example]) + (1 - gamma) ** 0.5 * np.asarray(eps[example])
        np.testing.assert_allclose(y[example], expected, rtol=1e-12)


def test_diffused_moments():
    eps = jnp.asarray(np.random.default_rng(1).normal(size=(5, 200_000, 1, 1)))
    y = np.asarray(diffuse(jnp.full_like(eps, 0.7), eps, jnp.asarray(GAMMAS)))
    np.testing.assert_allclose(y.mean(axis=(1, 2, 3)), 0.7 * np.sqrt(GAMMAS), atol=4 / 200_000**0.5)
    np.testing.assert_allclose(y.var(axis=(1, 2, 3)), 1 - GAMMAS, rtol=4 * (2 / 200_000) ** 0.5)


def test_single_steps_compose_to_the_marginal():
    schedule = respace(linear(), 12)
    alphas = schedule.gamma64[1:] / schedule.gamma64[:-1]
    np.testing.assert_allclose(schedule.beta, 1 - alphas, rtol=1e-6)
    # Pixel 0 carries y0 and pixel t the noise of step t: each ends as its coefficient.
    units = jnp.eye(13).reshape(13, 1, 13, 1, 1)
    y = units[0]
    for alpha, eps in zip(alphas, units[1:], strict=True):
        y = diffuse(y, eps, jnp.asarray(alpha))
    signal, noise = float(y.ravel()[0]), np.asarray(y.ravel()[1:])
    np.testing.assert_allclose(signal, schedule.gamma64[-1] ** 0.5, rtol=1e-12)
    np.testing.assert_allclose(np.sum(noise**2), 1 - schedule.gamma64[-1], rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_to_y0_inverts_target(prediction):
    y0, eps = pair()
    gamma = jnp.asarray(GAMMAS)
    y = diffuse(y0, eps, gamma)
    np.testing.assert_allclose(
        to_y0(target(y0, eps, gamma, prediction), y, gamma, prediction), y0, atol=1e-11
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_noise_can_be_computed_from_every_prediction(prediction):
    y0, eps = pair()
    gamma = jnp.asarray(GAMMAS)
    y = diffuse(y0, eps, gamma)
    y0_hat = to_y0(target(y0, eps, gamma, prediction), y, gamma, prediction)
    np.testing.assert_allclose(to_eps(y0_hat, y, gamma), eps, atol=1e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_wrong_prediction_gives_the_y0_that_would_have_made_it(prediction):
    """With y_t fixed, not only the true output maps back: `to_y0` inverts `target` for any output."""
    y, output = pair(3)
    gamma = jnp.asarray(GAMMAS)
    y0 = to_y0(output, y, gamma, prediction)
    np.testing.assert_allclose(
        target(y0, to_eps(y0, y, gamma), gamma, prediction), output, rtol=1e-6, atol=1e-9
    )


def test_v_is_the_velocity_of_y_along_the_angle_of_the_noise():
    """With sqrt(gamma) = cos(phi), y(phi) = cos(phi) y0 + sin(phi) eps turns at dy/dphi = v."""
    y0, eps = pair()
    phi = jnp.arccos(jnp.sqrt(jnp.asarray(GAMMAS)))

    def turn(phi: jax.Array) -> jax.Array:
        return diffuse(y0, eps, jnp.cos(phi) ** 2)

    _, velocity = jax.jvp(turn, (phi,), (jnp.ones_like(phi),))
    np.testing.assert_allclose(target(y0, eps, jnp.asarray(GAMMAS), "v"), velocity, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_scalar_gamma_is_the_same_gamma_for_each(prediction):
    y0, eps = pair()
    one, each = jnp.asarray(0.4), jnp.full((5,), 0.4)
    y = diffuse(y0, eps, each)
    np.testing.assert_array_equal(diffuse(y0, eps, one), y)
    np.testing.assert_array_equal(target(y0, eps, one, prediction), target(y0, eps, each, prediction))
    np.testing.assert_array_equal(to_y0(eps, y, one, prediction), to_y0(eps, y, each, prediction))
    np.testing.assert_array_equal(to_eps(y0, y, one), to_eps(y0, y, each))
    np.testing.assert_array_equal(posterior(y0, y, one, one + 0.1)[0], posterior(y0, y, each, each + 0.1)[0])


def product_of_gaussians(y0, y_t, gamma_t: float, gamma_s: float) -> tuple[np.ndarray, float]:
    """Bayes: N(y_s; sqrt(gamma_s) y0, 1 - gamma_s) times N(y_t; sqrt(r) y_s, 1 - r), as a density of y_s."""
    ratio = gamma_t / gamma_s
    prior_precision = 1 / (1 - gamma_s)
    likelihood_precision = ratio / (1 - ratio)
    from_prior = prior_precision * np.sqrt(gamma_s) * y0
    from_likelihood = likelihood_precision * y_t / np.sqrt(ratio)
    precision = prior_precision + likelihood_precision
    return (from_prior + from_likelihood) / precision, 1 / precision


@pytest.mark.parametrize("stride", [1, 7, 500], ids=lambda stride: f"{stride}_steps")
def test_posterior_is_bayes(stride):
    gamma = linear().gamma64
    t = np.array([2, 501, 900, 1500, 2000])
    t[0] = max(t[0], stride + 1)
    gamma_t, gamma_s = gamma[t], gamma[t - stride]
    y0, y_t = pair(5)
    mean, variance = posterior(y0, y_t, jnp.asarray(gamma_t), jnp.asarray(gamma_s))
    assert mean.shape == SHAPE and variance.shape == (5, 1, 1, 1)
    for i in range(5):
        expected = product_of_gaussians(np.asarray(y0[i]), np.asarray(y_t[i]), gamma_t[i], gamma_s[i])
        np.testing.assert_allclose(mean[i], expected[0], rtol=1e-8)
        np.testing.assert_allclose(variance[i].item(), expected[1], rtol=1e-8)


def test_posterior_of_the_clean_level_is_y0_itself():
    y0, y_t = pair()
    mean, variance = posterior(y0, y_t, jnp.asarray(0.7), jnp.asarray(1.0))
    np.testing.assert_allclose(mean, y0, rtol=1e-12)
    np.testing.assert_array_equal(variance, 0.0)


def test_posterior_undoes_diffuse_in_distribution():
    """Averaged over y_t ~ q(y_t | y0), y_s ~ posterior must be q(y_s | y0)."""
    gamma_t, gamma_s = jnp.asarray(0.2), jnp.asarray(0.6)
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    center, variance = posterior(one, diffuse(one, zero, gamma_t), gamma_t, gamma_s)
    spread, _ = posterior(zero, diffuse(zero, one, gamma_t), gamma_t, gamma_s)
    np.testing.assert_allclose(center.item(), 0.6**0.5, rtol=1e-12)
    np.testing.assert_allclose(spread.item() ** 2 + variance.item(), 1 - 0.6, rtol=1e-12)


def test_an_unknown_prediction_is_named_in_the_error():
    y0, eps = pair()
    gamma = jnp.asarray(0.5)
    with pytest.raises(ValueError, match="one of eps, v, y0, got 'score'"):
        target(y0, eps, gamma, "score")
    with pytest.raises(ValueError, match="one of eps, v, y0, got 'score'"):
        to_y0(eps, y0, gamma, "score")
