"""The reverse loop: samples for each kind of key, condition, space and prediction, and snapshots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion import solvers
from sr3_jax.diffusion.process import PREDICTIONS, target, to_eps
from sr3_jax.diffusion.sampler import Samples, sample
from sr3_jax.diffusion.schedule import linear, respace
from sr3_jax.diffusion.solvers import Carry
from sr3_jax.diffusion.space import Space, image, residual

TRAINING = linear()
SHAPE = (3, 4, 5, 2)
ALL = {
    "ancestral": solvers.ancestral(),
    "ddim": solvers.ddim(),
    "ddim_noisy": solvers.ddim(0.5),
    "dpmpp_2m": solvers.dpmpp_2m(),
    "heun": solvers.heun(),
}
each_solver = pytest.mark.parametrize("solver", ALL.values(), ids=ALL.keys())


def network(y, gamma, cond):
    """A nonlinear estimate of y0, so that a wrong y, gamma or order of steps changes the image."""
    return 0.8 * jnp.tanh(2.0 * y) * gamma.reshape(-1, 1, 1, 1) ** 0.25


def sampled(
    steps=5, *, denoiser=network, key=None, cond=None, shape=SHAPE, prediction="y0", **settings
) -> Samples:
    key = jax.random.key(0) if key is None else key
    schedule = respace(TRAINING, steps)
    return sample(
        denoiser, key, cond or {}, shape=shape, schedule=schedule, prediction=prediction, **settings
    )


def first_noise(key, shape) -> jax.Array:
    """y_T: a single step returns the network's estimate. It is y_T / 16, so that clipping to [-1,1] has no effect."""
    return 16 * sampled(1, denoiser=lambda y, gamma, cond: y / 16, key=key, shape=shape).image


# --- snapshots


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_snapshots_equal_those_of_an_explicit_loop(name):
    solver, schedule = ALL[name], respace(TRAINING, 8)
    start = first_noise(jax.random.key(0), SHAPE)

    def denoise(y, gamma):
        return jnp.clip(network(y, jnp.full((3,), gamma), {}), -1, 1)

    table = solver.coefficients(schedule)
    carry = Carry(start, solver.compiled.init(start))
    by_hand = []
    for step in range(8):
        carry = solver.compiled.step(
            denoise, carry, None, jax.tree.map(lambda column, step=step: column[step], table)
        )
        by_hand.append(carry.y)
    got = sampled(8, solver=solver, snapshots=3)
    assert got.snapshots.shape == (2, *SHAPE)
    np.testing.assert_allclose(got.snapshots, np.stack([by_hand[2], by_hand[5]]), atol=1e-4)
    np.testing.assert_allclose(got.image, np.clip(by_hand[7], -1, 1), atol=1e-4)


def test_snapshots_every_k_steps_are_every_kth_of_all():
    without, every = sampled(8), sampled(8, snapshots=1)
    assert without.snapshots is None
    assert every.snapshots.shape == (8, *SHAPE)
    np.testing.assert_allclose(every.image, without.image, atol=1e-6)
    np.testing.assert_array_equal(np.clip(every.snapshots[-1], -1, 1), every.image)
    assert np.abs(every.snapshots[0]).max() > 1  # noise, not clipped
    for k, count in [(3, 2), (4, 2), (8, 1)]:
        some = sampled(8, snapshots=k)
        assert some.snapshots.shape == (count, *SHAPE)
        np.testing.assert_allclose(some.snapshots, every.snapshots[k - 1 :: k], atol=1e-6)
        np.testing.assert_allclose(some.image, without.image, atol=1e-6)


def test_snapshots_are_images_in_the_residual_space_too():
    cond = {"upsampled": jnp.full(SHAPE, 0.4)}
    got = sampled(
        4, cond=cond, denoiser=lambda y, gamma, cond: jnp.zeros_like(y), space=residual(5.0), snapshots=4
    )
    np.testing.assert_allclose(got.snapshots[0], cond["upsampled"], atol=1e-6)


# --- noise and keys


def noise_of_each_step(key, shape) -> np.ndarray:
    """[N, ...]: y_T and the fresh noise of all steps but the last, from a run whose network predicts 0."""
    schedule = respace(TRAINING, 6)
    zero = functools.partial(
        sampled,
        6,
        denoiser=lambda y, gamma, cond: jnp.zeros_like(y),
        key=key,
        shape=shape,
        solver=solvers.ddpm(),
    )
    y = np.asarray(zero(snapshots=1).snapshots, np.float64)
    gamma = schedule.gamma64[::-1]
    alpha = gamma[:-1] / gamma[1:]
    from_y = np.sqrt(alpha) * (1 - gamma[1:]) / (1 - gamma[:-1])
    start = np.asarray(first_noise(key, shape))
    before = np.concatenate([start[None], y[:-1]])
    fresh = [(y[i] - from_y[i] * before[i]) / np.sqrt(1 - alpha[i]) for i in range(5)]
    return np.stack([start, *fresh])


@pytest.mark.parametrize("keyed", [False, True], ids=["one_key", "key_per_example"])
def test_all_noise_is_unit_normal_and_independent(keyed):
    shape = (2, 40, 40, 1)
    key = jax.random.split(jax.random.key(5), 2) if keyed else jax.random.key(5)
    with jax.debug_key_reuse(False):  # two runs of one key, on purpose
        noise = noise_of_each_step(key, shape).reshape(12, -1)  # 6 steps of 2 examples
    np.testing.assert_allclose(noise.mean(axis=1), np.zeros(12), atol=4 / 40)
    np.testing.assert_allclose(noise.var(axis=1), np.ones(12), atol=4 * 2**0.5 / 40)
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(12), atol=4.5 / 40)


def test_y_t_is_the_same_for_every_number_of_steps_and_solver():
    def first_y(steps, solver):
        seen = []

        def recorded(y, gamma, cond):
            seen.append(np.asarray(y))
            return network(y, gamma, cond)

        with jax.disable_jit():  # so that the network is given values
            sampled(steps, denoiser=recorded, solver=solver)
        return seen[0]

    start = first_y(2, ALL["ddim"])
    for steps, solver in [(1, ALL["ddim"]), (2, ALL["heun"]), (4, ALL["ancestral"]), (3, ALL["dpmpp_2m"])]:
        np.testing.assert_array_equal(first_y(steps, solver), start)


@each_solver
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_per_example_keys_make_examples_independent_of_their_batch(solver, jitted):
    """Under jax_debug_key_reuse, as in all tests."""
    keys = jax.random.split(jax.random.key(3), 4)
    upsampled = jax.random.normal(jax.random.key(4), (4, *SHAPE[1:]))

    def conditioned(y, gamma, cond):
        return network(y + cond["upsampled"], gamma, cond)

    def run(order):
        def once(key, cond):
            shape = (len(order), *SHAPE[1:])
            return sampled(4, denoiser=conditioned, key=key, cond=cond, shape=shape, solver=solver).image

        return np.asarray((jax.jit(once) if jitted else once)(keys[order], {"upsampled": upsampled[order]}))

    together = run(np.arange(4))
    assert len(np.unique(together.reshape(4, -1)[:, 0])) == 4
    np.testing.assert_allclose(run(np.array([3, 1])), together[[3, 1]], atol=1e-6)
    np.testing.assert_allclose(run(np.array([2])), together[[2]], atol=1e-6)


def test_images_are_determined_by_the_key():
    first, again, other = (sampled(key=jax.random.key(seed)).image for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first[0] - first[1]).max() > 0.1


# --- the images


@each_solver
@pytest.mark.parametrize("steps", [1, 6])
def test_the_estimate_is_clipped_in_the_space_and_the_image_is_in_range(solver, steps):
    """A network that always predicts 5 gives white with every solver: no noise is left after the last step."""
    bright = sampled(
        steps, denoiser=lambda y, gamma, cond: jnp.full_like(y, 5.0), solver=solver, snapshots=steps
    )
    np.testing.assert_allclose(bright.image, np.ones(SHAPE), atol=1e-6)
    np.testing.assert_allclose(bright.snapshots[0], np.ones(SHAPE), atol=1e-6)  # not only by the last clip
    assert bright.image.dtype == jnp.float32


def test_without_clipping_in_the_space_the_image_is_still_in_range():
    loose = Space(encode=lambda y, cond: y, decode=lambda z, cond: z, clip=lambda z, cond: z)
    bright = sampled(3, denoiser=lambda y, gamma, cond: jnp.full_like(y, 5.0), space=loose)
    np.testing.assert_array_equal(bright.image, np.ones(SHAPE))


@each_solver
def test_every_prediction_gives_the_same_images(solver):
    def predict(prediction, y, gamma, cond):
        y0 = network(y, gamma, cond)
        return target(y0, to_eps(y0, y, gamma), gamma, prediction)

    eps, v, y0 = (
        sampled(
            12, denoiser=functools.partial(predict, prediction), prediction=prediction, solver=solver
        ).image
        for prediction in PREDICTIONS
    )
    np.testing.assert_allclose(v, y0, atol=2e-3)
    np.testing.assert_allclose(eps, y0, atol=2e-3)


@each_solver
@pytest.mark.parametrize("space", [image(), residual(4.0)], ids=["image", "residual"])
def test_a_network_that_knows_the_image_samples_it(solver, space):
    """The network reads y0 from the condition and encodes it in the space: the output is that image."""
    truth = jax.random.uniform(jax.random.key(1), SHAPE, minval=-1.0, maxval=1.0)
    cond = {
        "upsampled": jax.random.uniform(jax.random.key(2), SHAPE, minval=-1.2, maxval=1.2),
        "truth": truth,
    }

    def knowing(y, gamma, cond):
        return space.encode(cond["truth"], cond)

    np.testing.assert_allclose(
        sampled(6, denoiser=knowing, cond=cond, solver=solver, space=space).image, truth, atol=1e-5
    )


def test_the_condition_is_passed_unchanged_to_the_network_in_every_step():
    cond = {"upsampled": jnp.ones(SHAPE), "label": jnp.arange(3), "augment": jnp.zeros(3)}
    given = []

    def recorded(y, gamma, cond):
        given.append(cond)
        return network(y, gamma, cond)

    sampled(denoiser=recorded, cond=cond)
    assert all(seen[name] is cond[name] for seen in given for name in cond)


def test_invalid_keys_and_snapshots_fail():
    with pytest.raises(ValueError, match=r"one key or 3 keys, got shape \(2,\)"):
        sampled(key=jax.random.split(jax.random.key(0), 2))
    for snapshots in (-1, 6):  # every 6th of 5 steps is none
        with pytest.raises(ValueError, match=f"snapshots must be .*, got {snapshots}"):
            sampled(5, snapshots=snapshots)
