"""The solvers against their formulas in float64, and on data whose optimal denoiser is known.

For y0 ~ N(0.3, 0.2^2) the mean of y0 given y_t, the flow from y_T to y0 and all moments have closed forms.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.diffusion import solvers
from sr3_jax.diffusion.sampler import sample
from sr3_jax.diffusion.schedule import linear, respace
from sr3_jax.diffusion.space import Space

MEAN, STD = 0.3, 0.2
TRAINING = linear()
SHAPE = (1, 112, 112, 1)
UNCLIPPED = Space(encode=lambda y, cond: y, decode=lambda z, cond: z, clip=lambda z, cond: z)


# --- the formulas, step by step


def bent(y, gamma):
    """A nonlinear network with outputs beyond [-1,1], so that order, history and clipping have an effect."""
    return 1.3 * np.sin(2.0 * np.asarray(y, np.float64)) * float(gamma) ** 0.25 + 0.2


def denoise(y, gamma):
    return jnp.asarray(np.clip(bent(y, gamma), -1, 1), jnp.float32)


def reference_ancestral(y, levels, noises, variance):
    for gamma_t, gamma_s, z in zip(levels[:-1], levels[1:], noises, strict=True):
        y0 = np.clip(bent(y, gamma_t), -1, 1)
        if gamma_s == 1:
            return y0
        ratio = gamma_t / gamma_s
        mean = (gamma_s**0.5 * (1 - ratio) * y0 + ratio**0.5 * (1 - gamma_s) * y) / (1 - gamma_t)
        exact = (1 - gamma_s) * (1 - ratio) / (1 - gamma_t)
        y = mean + (exact ** (1 - variance) * (1 - ratio) ** variance) ** 0.5 * z
    raise AssertionError("the grid ends at 1")


def reference_ddim(y, levels, noises, eta):
    for gamma_t, gamma_s, z in zip(levels[:-1], levels[1:], noises, strict=True):
        y0 = np.clip(bent(y, gamma_t), -1, 1)
        eps = (y - gamma_t**0.5 * y0) / (1 - gamma_t) ** 0.5
        c = eta * ((1 - gamma_t / gamma_s) * (1 - gamma_s) / (1 - gamma_t)) ** 0.5
        y = gamma_s**0.5 * y0 + (1 - gamma_s - c**2) ** 0.5 * eps + c * z
    return y


def reference_2m(y, levels):
    y0_before = half_before = None
    for gamma_t, gamma_s in pairwise(levels):
        y0 = np.clip(bent(y, gamma_t), -1, 1)
        if gamma_s == 1:
            return y0
        half_t, half_s = (0.5 * np.log(g / (1 - g)) for g in (gamma_t, gamma_s))
        h = half_s - half_t
        estimate = y0
        if y0_before is not None:
            q = (half_t - half_before) / h
            estimate = (1 + 1 / (2 * q)) * y0 - 1 / (2 * q) * y0_before
        y = ((1 - gamma_s) / (1 - gamma_t)) ** 0.5 * y - gamma_s**0.5 * np.expm1(-h) * estimate
        y0_before, half_before = y0, half_t
    raise AssertionError("the grid ends at 1")


def reference_heun(y, levels):
    x = y / levels[0] ** 0.5
    for gamma_t, gamma_s in pairwise(levels):
        sigma_t, sigma_s = (((1 - g) / g) ** 0.5 for g in (gamma_t, gamma_s))
        slope = (x - np.clip(bent(x * gamma_t**0.5, gamma_t), -1, 1)) / sigma_t
        euler = x + (sigma_s - sigma_t) * slope
        if sigma_s == 0:
            return euler
        if sigma_t > solvers.HEUN_WIDEST * sigma_s:
            x = euler
            continue
        slope_s = (euler - np.clip(bent(euler * gamma_s**0.5, gamma_s), -1, 1)) / sigma_s
        x = x + (sigma_s - sigma_t) * 0.5 * (slope + slope_s)
    raise AssertionError("the grid ends at 1")


CASES = {
    **{
        f"ancestral_{v}": (solvers.ancestral(v), lambda y, g, z, v=v: reference_ancestral(y, g, z, v))
        for v in (0.0, 0.3, 1.0)
    },
    **{
        f"ddim_{eta}": (solvers.ddim(eta), lambda y, g, z, eta=eta: reference_ddim(y, g, z, eta))
        for eta in (0.0, 0.5, 1.0)
    },
    "dpmpp_2m": (solvers.dpmpp_2m(), lambda y, g, z: reference_2m(y, g)),
    "heun": (solvers.heun(), lambda y, g, z: reference_heun(y, g)),
}


def gap_to_reference(name, schedule) -> float:
    """The largest difference between a solver in float32 and its formulas in float64, with the same noise."""
    solver, reference = CASES[name]
    steps = schedule.num_steps
    generator = np.random.default_rng(steps)
    y = generator.normal(size=(2, 5, 5, 1))
    noises = generator.normal(size=(steps, 2, 5, 5, 1))
    start, table = jnp.asarray(y, jnp.float32), solver.coefficients(schedule)
    carry = solvers.Carry(start, solver.compiled.init(start))
    with jax.disable_jit():  # so that `denoise` gets concrete values inside Heun's branch
        for step in range(steps):
            row = jax.tree.map(lambda column, step=step: column[step], table)
            z = jnp.asarray(noises[step], jnp.float32) if solver.compiled.stochastic else None
            carry = solver.compiled.step(denoise, carry, z, row)
    return float(np.abs(carry.y - reference(y, schedule.gamma64[::-1], noises)).max())


# Levels close enough together that no solver magnifies the rounding of its network.
MODEST = linear(60, beta_start=1e-3, beta_end=0.08)


@pytest.mark.parametrize("spacing", ["log_snr", "uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", CASES)
def test_each_step_matches_its_formula(name, steps, spacing):
    assert gap_to_reference(name, respace(MODEST, steps, spacing)) < 2e-5


@pytest.mark.parametrize("name", CASES)
def test_few_wide_steps_match_the_formula_in_float32(name):
    """Steps over several powers of ten in sigma: in x = y / sqrt(gamma) Heun would round to nonsense."""
    assert gap_to_reference(name, respace(TRAINING, 5)) < 1e-2


def test_ddim_with_eta_1_is_ancestral_with_the_posterior_variance():
    schedule = respace(TRAINING, 9)
    for ours, theirs in zip(
        solvers.ddim(1.0).coefficients(schedule), solvers.ancestral(0.0).coefficients(schedule), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_tables_keep_their_digits_at_the_clean_end():
    """From a float32 gamma, 1 - gamma near 1e-6 would be wrong by a percent."""
    noise = solvers.ancestral(1.0).coefficients(TRAINING).noise
    np.testing.assert_allclose(noise[-2], (1e-6 + (1e-2 - 1e-6) / 1999) ** 0.5, rtol=1e-6)
    beta_1, beta_2 = 1e-6, 1e-6 + (1e-2 - 1e-6) / 1999
    for solver in (solvers.dpmpp_2m(), solvers.ddim()):
        from_y = solver.coefficients(TRAINING).from_y
        expected = (beta_1 / (beta_1 + beta_2 - beta_1 * beta_2)) ** 0.5
        np.testing.assert_allclose(from_y[-2], expected, rtol=1e-6)


@pytest.mark.parametrize("build", [solvers.ancestral, solvers.ddim])
@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_variance_and_eta_outside_0_to_1_fail(build, share):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got"):
        build(share)


# --- Gaussian data


def gaussian(y, gamma, cond):
    """E[y0 | y_t] for y0 ~ N(MEAN, STD^2)."""
    gamma = gamma.reshape(-1, 1, 1, 1)
    gain = jnp.sqrt(gamma) * STD**2 / (gamma * STD**2 + 1 - gamma)
    return MEAN + gain * (y - jnp.sqrt(gamma) * MEAN)


def images(solver, steps: int, spacing: str, network=gaussian) -> np.ndarray:
    schedule = respace(TRAINING, steps, spacing)
    samples = sample(
        network,
        jax.random.key(0),
        {},
        shape=SHAPE,
        schedule=schedule,
        solver=solver,
        prediction="y0",
        space=UNCLIPPED,
    )
    return np.asarray(samples.image)


@pytest.fixture(scope="module")
def flow() -> np.ndarray:
    """The exact solution of the ODE from y_T: a pixel's distance from the mean, in standard deviations, is constant."""
    # y_T: a single step returns the network's estimate. It is y_T / 16, so that clipping to [-1,1] has no effect.
    y = 16 * images(solvers.ddim(), 1, "log_snr", lambda y, gamma, cond: y / 16).astype(np.float64)
    gamma = TRAINING.gamma64[-1]
    deviations = (y - gamma**0.5 * MEAN) / (gamma * STD**2 + 1 - gamma) ** 0.5
    return np.clip(MEAN + STD * deviations, -1, 1)


def error(image: np.ndarray, flow: np.ndarray) -> float:
    return float(np.sqrt(np.mean((image - flow) ** 2)))


@pytest.mark.parametrize(
    "solver, spacing",
    [
        (solvers.ddpm(), "log_snr"),
        (solvers.ancestral(0.0), "log_snr"),
        (solvers.ancestral(0.5), "uniform"),
        (solvers.ddim(), "uniform"),
        (solvers.ddim(0.5), "log_snr"),
        (solvers.dpmpp_2m(), "log_snr"),
        (solvers.heun(), "karras"),
    ],
    ids=[
        "ddpm",
        "ancestral_exact",
        "ancestral_uniform",
        "ddim",
        "ddim_noisy",
        "dpmpp_2m",
        "heun",
    ],
)
def test_every_solver_converges_to_the_right_mean_and_variance(solver, spacing):
    image = images(solver, 500, spacing)
    pixels = image.size
    np.testing.assert_allclose(image.mean(), MEAN, atol=4 * STD / pixels**0.5)
    # 4 sigma of the sampling error of a standard deviation, and 2% for the number of steps.
    np.testing.assert_allclose(image.std(), STD, rtol=0.02 + 4 / (2 * pixels) ** 0.5)


def test_the_two_variances_bracket_the_truth_at_few_steps():
    spread = [images(solvers.ancestral(v), 25, "log_snr").std() for v in (0.0, 0.5, 1.0)]
    assert spread[0] < 0.85 * STD and spread[2] > 1.15 * STD
    assert spread[0] < spread[1] < spread[2]
    assert images(solvers.ddpm(), 25, "log_snr").std() == spread[2]


@pytest.mark.parametrize("steps", [25, 100])
def test_the_ancestral_sampler_adds_no_noise_by_default(steps):
    np.testing.assert_allclose(images(solvers.ancestral(), steps, "log_snr").std(), STD, rtol=0.03)


@pytest.mark.parametrize("steps", [2, 3, 4, 6, 8])
def test_heun_is_at_least_as_close_to_the_flow_as_ddim_on_its_grid(steps, flow):
    euler = error(images(solvers.ddim(), steps, "karras"), flow)
    assert error(images(solvers.heun(), steps, "karras"), flow) < 1.05 * euler


# RMSE to the exact flow at 10 and 25 steps.
KNOWN = {
    "ddim_uniform": (solvers.ddim(), "uniform", 0.100, 0.046),
    "ddim_log_snr": (solvers.ddim(), "log_snr", 0.056, 0.023),
    "dpmpp_2m_log_snr": (solvers.dpmpp_2m(), "log_snr", 0.008, 0.003),
    "heun_karras": (solvers.heun(), "karras", 0.078, 0.009),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_distance_to_the_flow_has_not_changed(name, flow):
    solver, spacing, *expected = KNOWN[name]
    got = [error(images(solver, steps, spacing), flow) for steps in (10, 25)]
    np.testing.assert_allclose(got, expected, rtol=0.08)


def test_2m_on_the_log_snr_grid_is_ten_times_as_accurate_as_ddim_on_the_uniform_one(flow):
    ours = error(images(solvers.dpmpp_2m(), 10, "log_snr"), flow)
    assert 10 * ours < error(images(solvers.ddim(), 10, "uniform"), flow)


@pytest.mark.parametrize(
    "solver, spacing, order",
    [(solvers.ddim(), "log_snr", 1), (solvers.dpmpp_2m(), "log_snr", 2), (solvers.heun(), "karras", 2)],
    ids=["ddim", "dpmpp_2m", "heun"],
)
def test_halving_the_step_shows_the_order(solver, spacing, order, flow):
    errors = np.array([error(images(solver, steps, spacing), flow) for steps in (40, 80, 160)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), [order, order], atol=0.15)


# --- learned variance


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0])
def test_a_learned_variance_that_is_constant_is_that_of_the_ancestral_solver(v):
    grid = respace(TRAINING, 6)
    options = {"shape": (1, 8, 8, 1), "schedule": grid, "space": UNCLIPPED}

    def learned(y, gamma, cond):
        return jnp.concatenate([0.5 * y, jnp.full_like(y, 2 * v - 1)], axis=-1)

    def run(denoiser, solver):
        return sample(denoiser, jax.random.key(0), {}, solver=solver, **options).image

    found = run(learned, solvers.ancestral_learned())
    np.testing.assert_allclose(found, run(lambda y, *_: 0.5 * y, solvers.ancestral(v)), atol=1e-5)
    # The other solvers read the first half only.
    np.testing.assert_array_equal(run(learned, solvers.ddim()), run(lambda y, *_: 0.5 * y, solvers.ddim()))
    with pytest.raises(ValueError, match="2C"):
        run(lambda y, *_: 0.5 * y, solvers.ancestral_learned())
