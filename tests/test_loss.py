"""The loss of networks for which it is known, its weightings, and the inputs of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion.loss import denoising_loss, min_snr
from sr3_jax.diffusion.process import PREDICTIONS, diffuse, target, to_eps
from sr3_jax.diffusion.schedule import from_gamma, linear
from sr3_jax.diffusion.space import image, residual

# Far enough from 0 and 1 for conversions between predictions in float32 to be exact to 1e-5.
MILD = from_gamma(np.array([1.0, 0.95, 0.7, 0.4, 0.1, 0.05]))
SHAPE = (6, 32, 32, 3)


def photographs(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0, maxval=1.0)


def along(gamma: jax.Array) -> jax.Array:
    return gamma.reshape(-1, 1, 1, 1)


def recorded(network, seen: dict):
    """The network, recording its inputs in `seen` (without jit)."""

    def call(y_t, gamma, cond):
        seen.update(y_t=y_t, gamma=gamma, cond=cond)
        return network(y_t, gamma, cond)

    return call


def zero(y_t, gamma, cond):
    return jnp.zeros_like(y_t)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", [image(), residual(4.0)], ids=["image", "residual"])
def test_perfect_network_has_zero_loss(prediction, norm, space):
    y0, cond = photographs(), {"upsampled": photographs(1)}

    def perfect(y_t, gamma, cond):
        z0 = space.encode(y0, cond)
        return target(z0, to_eps(z0, y_t, gamma), gamma, prediction)

    loss = denoising_loss(
        perfect, jax.random.key(2), y0, cond, schedule=MILD, prediction=prediction, norm=norm, space=space
    )
    assert loss.shape == (6,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.zeros(6), atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", [image(), residual(4.0)], ids=["image", "residual"])
def test_perceptual_loss_of_the_estimate_as_an_image_is_added(prediction, space):
    y0, cond, seen = photographs(), {"upsampled": photographs(1)}, []

    def perfect(y_t, gamma, cond):
        z0 = space.encode(y0, cond)
        return target(z0, to_eps(z0, y_t, gamma), gamma, prediction)

    def perceptual(key, y0_hat, given):
        seen.append((y0_hat, given))
        return jnp.arange(6.0)

    options = {"schedule": MILD, "prediction": prediction, "space": space}
    with_it = denoising_loss(perfect, jax.random.key(2), y0, cond, perceptual=perceptual, **options)
    without = denoising_loss(perfect, jax.random.key(2), y0, cond, **options)
    np.testing.assert_allclose(with_it - without, np.arange(6.0), atol=1e-6)
    ((y0_hat, given),) = seen
    np.testing.assert_allclose(y0_hat, y0, atol=1e-4)
    assert given is y0


@pytest.mark.parametrize("norm, expected", [("l2", 1.0), ("l1", (2 / np.pi) ** 0.5)])
def test_loss_of_zero_eps_prediction_is_the_noise_moment(norm, expected):
    loss = denoising_loss(zero, jax.random.key(3), photographs(), {}, schedule=linear(), norm=norm)
    np.testing.assert_allclose(loss, np.full(6, expected), atol=5 * (2 / 3072) ** 0.5)


def test_loss_of_zero_y0_prediction_is_the_image_power():
    y0 = photographs()
    loss = denoising_loss(zero, jax.random.key(3), y0, {}, schedule=linear(), prediction="y0", norm="l2")
    np.testing.assert_allclose(loss, np.mean(np.square(y0), axis=(1, 2, 3)), rtol=1e-5)


def test_loss_of_zero_v_prediction_mixes_both_by_gamma():
    seen: dict = {}
    y0 = jnp.full(SHAPE, 0.6)
    loss = denoising_loss(
        recorded(zero, seen), jax.random.key(3), y0, {}, schedule=linear(), prediction="v", norm="l2"
    )
    gamma = np.asarray(seen["gamma"])
    assert np.ptp(gamma) > 0.5
    np.testing.assert_allclose(loss, gamma + (1 - gamma) * 0.6**2, atol=5 * (3 / 3072) ** 0.5)


@pytest.mark.parametrize("norm, power", [("l1", 1), ("l2", 2)])
def test_constant_error_is_raised_to_the_power_of_the_norm(norm, power):
    loss = denoising_loss(
        lambda y_t, gamma, cond: photographs() - 0.3,
        jax.random.key(0),
        photographs(),
        {},
        schedule=MILD,
        prediction="y0",
        norm=norm,
    )
    np.testing.assert_allclose(loss, np.full(6, 0.3**power), rtol=1e-4)


def test_losses_of_examples_are_independent():
    def loss(y0):
        return denoising_loss(
            lambda y_t, gamma, cond: 0.5 * y_t, jax.random.key(1), y0, {}, schedule=MILD, prediction="y0"
        )

    y0 = photographs()
    changed = loss(y0.at[2].add(0.5)) != loss(y0)
    np.testing.assert_array_equal(changed, np.arange(6) == 2)


@pytest.mark.parametrize("space", [image(), residual(4.0)], ids=["image", "residual"])
def test_network_gets_gamma_diffused_variable_and_condition(space):
    seen: dict = {}
    y0, cond = photographs(), {"upsampled": photographs(1), "label": jnp.arange(6)}
    denoising_loss(recorded(zero, seen), jax.random.key(4), y0, cond, schedule=MILD, space=space)
    assert seen["cond"] is cond
    gamma = np.asarray(seen["gamma"])
    assert gamma.shape == (6,) and len(np.unique(gamma)) == 6
    assert gamma.min() >= MILD.gamma[-1] and gamma.max() <= 1
    np.testing.assert_array_equal(  # stratified: one in each of six equal parts of the five steps
        np.sort(np.floor(np.interp(gamma, MILD.gamma[::-1], np.arange(6.0)[::-1]) * 6 / 5)), np.arange(6)
    )
    # y_t minus its signal is noise of variance 1 - gamma, in either space.
    z0 = space.encode(y0, cond)
    noise = np.asarray(seen["y_t"] - jnp.sqrt(along(seen["gamma"])) * z0)
    np.testing.assert_allclose(noise.mean(axis=(1, 2, 3)), np.zeros(6), atol=5 / 3072**0.5)
    np.testing.assert_allclose(noise.var(axis=(1, 2, 3)), 1 - gamma, rtol=5 * (2 / 3072) ** 0.5)
    assert (
        abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1
    )  # and independent between examples


def test_loss_is_determined_by_the_key():
    loss = functools.partial(denoising_loss, zero, y0=photographs(), cond={}, schedule=linear())
    np.testing.assert_array_equal(loss(jax.random.key(5)), loss(jax.random.key(5)))
    assert not np.any(loss(jax.random.key(5)) == loss(jax.random.key(6)))


def test_min_snr_weights_match_the_paper():
    gamma = np.array([1e-4, 0.2, 0.5, 5 / 6, 0.9, 0.9999], np.float32)
    snr = gamma.astype(np.float64) / (1 - gamma.astype(np.float64))
    clamped = np.minimum(snr, 5.0)
    for prediction, expected in {"y0": clamped, "eps": clamped / snr, "v": clamped / (snr + 1)}.items():
        np.testing.assert_allclose(min_snr()(jnp.asarray(gamma), prediction), expected, rtol=1e-5)
    np.testing.assert_allclose(min_snr(2.0)(jnp.asarray([0.9]), "y0"), [2.0], rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_finite_at_both_ends(prediction):
    weights = min_snr()(jnp.asarray([1.0, linear().gamma[-1]]), prediction)
    assert np.all(np.isfinite(weights)) and np.all(weights >= 0)


def test_min_snr_loss_is_equal_for_all_predictions():
    """The same estimate of y0, expressed as eps, v or y0, has the same weighted squared error."""
    y0 = photographs()

    def network(prediction, y_t, gamma, cond):
        estimate = 0.3 * y_t + 0.2
        return target(estimate, to_eps(estimate, y_t, gamma), gamma, prediction)

    losses = {
        prediction: denoising_loss(
            functools.partial(network, prediction),
            jax.random.key(7),
            y0,
            {},
            schedule=MILD,
            prediction=prediction,
            norm="l2",
            weighting=min_snr(),
        )
        for prediction in PREDICTIONS
    }
    np.testing.assert_allclose(losses["eps"], losses["y0"], rtol=1e-4)
    np.testing.assert_allclose(losses["v"], losses["y0"], rtol=1e-4)


def test_weighting_multiplies_each_example_by_the_weight_of_its_gamma():
    seen: dict = {}
    arguments = dict(schedule=MILD, prediction="v", norm="l1")
    y0 = photographs()
    plain = denoising_loss(recorded(zero, seen), jax.random.key(8), y0, {}, **arguments)

    def weighting(gamma, prediction):
        assert prediction == "v"
        return 10.0 * gamma

    weighted = denoising_loss(zero, jax.random.key(8), y0, {}, weighting=weighting, **arguments)
    np.testing.assert_allclose(weighted, plain * 10.0 * seen["gamma"], rtol=1e-6)


def test_loss_is_minimal_at_the_posterior_mean():
    """For y0 ~ N(m, s^2) the optimal affine network is known, and the gradient of the mean loss is zero there."""
    mean, std = 0.3, 0.2
    schedule = from_gamma(np.array([1.0, 0.5]))
    y0 = mean + std * jax.random.normal(jax.random.key(0), (64, 32, 32, 3))

    def network(shift, y_t, gamma, cond):
        gamma = along(gamma)
        gain = jnp.sqrt(gamma) * std**2 / (gamma * std**2 + 1 - gamma)
        return mean + shift[0] + (1 + shift[1]) * gain * (y_t - jnp.sqrt(gamma) * mean)

    def objective(shift):
        denoiser = functools.partial(network, shift)
        return denoising_loss(
            denoiser, jax.random.key(1), y0, {}, schedule=schedule, prediction="y0", norm="l2"
        ).mean()

    slope = jax.jit(jax.grad(objective))
    np.testing.assert_allclose(slope(jnp.zeros(2)), np.zeros(2), atol=3e-3)
    off = slope(jnp.array([0.1, 1.0]))
    assert off[0] > 0.1 and off[1] > 0.01


def test_unknown_norm_or_prediction_fails():
    for wrong, message in [
        ({"norm": "huber"}, "got 'huber'"),
        ({"prediction": "score"}, "got 'score'"),
    ]:
        with pytest.raises(ValueError, match=message):
            denoising_loss(zero, jax.random.key(0), photographs(), {}, schedule=MILD, **wrong)


def test_loss_matches_equation_6_written_out():
    """With the noise known, y_t, target and error of Eq. 6 can be computed directly."""
    seen: dict = {}
    y0 = photographs()
    loss = denoising_loss(recorded(zero, seen), jax.random.key(9), y0, {}, schedule=MILD, norm="l1")
    eps = to_eps(y0, seen["y_t"], seen["gamma"])
    np.testing.assert_allclose(diffuse(y0, eps, seen["gamma"]), seen["y_t"], atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(np.abs(eps), axis=(1, 2, 3)), rtol=1e-4)


def test_prediction_of_another_shape_fails():
    y0 = jnp.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\), got \(2, 4, 4, 1\)"):
        denoising_loss(lambda y, gamma, cond: y[..., :1], jax.random.key(0), y0, {}, schedule=linear())
