"""Noise schedules against 50-digit arithmetic, the properties of respacing, and the histogram of p(gamma)."""

from decimal import Decimal, localcontext
from itertools import pairwise

import jax
import numpy as np
import pytest
from scipy import stats

from sr3_jax.diffusion.schedule import (
    cosine,
    from_beta,
    from_gamma,
    linear,
    quadratic,
    respace,
    sample_gamma,
)

BUILDERS = {"linear": linear, "quadratic": quadratic, "cosine": cosine}
SPACINGS = ("log_snr", "uniform", "karras", "linear")


def exact_betas(name: str, steps: int) -> list[Decimal]:
    """The formulas for beta_1..beta_T in the current decimal precision."""
    low, high = Decimal("1e-6"), Decimal("1e-2")
    share = [Decimal(t) / (steps - 1) for t in range(steps)]
    if name == "linear":
        return [low + s * (high - low) for s in share]
    return [(low.sqrt() + s * (high.sqrt() - low.sqrt())) ** 2 for s in share]


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_every_float32_table_is_the_rounded_exact_one(name):
    schedule = BUILDERS[name]()
    with localcontext() as context:
        context.prec = 50
        gammas = [Decimal(1)]
        for beta in exact_betas(name, 2000):
            gammas.append(gammas[-1] * (1 - beta))
        gamma = np.array([float(g) for g in gammas])
        beta = np.array([float(1 - b / a) for a, b in pairwise(gammas)])
        log_snr = np.array([float((g / (1 - g)).ln()) for g in gammas[1:]])
    assert schedule.num_steps == 2000
    assert schedule.gamma.dtype == schedule.beta.dtype == schedule.log_snr.dtype == np.float32
    np.testing.assert_allclose(schedule.gamma64, gamma, rtol=1e-12)
    # Half a float32 unit in the last place: at the clean end this fails for tables made from a float32 gamma.
    np.testing.assert_allclose(schedule.gamma, gamma, rtol=6.1e-8)
    np.testing.assert_allclose(schedule.beta, beta, rtol=6.1e-8)
    np.testing.assert_allclose(schedule.log_snr[1:], log_snr, rtol=6.1e-8, atol=1e-9)
    assert np.isposinf(schedule.log_snr[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_gamma_decreases_strictly_from_one_in_float32(name):
    gamma = BUILDERS[name]().gamma
    assert gamma[0] == 1.0
    assert np.all(np.diff(gamma) < 0)
    assert gamma[-1] > 0


def test_the_end_points_of_the_training_schedule():
    schedule = linear()
    np.testing.assert_allclose(schedule.beta[[0, -1]], [1e-6, 1e-2], rtol=1e-7)
    np.testing.assert_allclose(schedule.gamma[-1], 4.39e-5, rtol=1e-3)


@pytest.mark.parametrize("steps, beta_end", [(1000, 0.0199), (250, 0.0781), (100, 0.188), (25, 0.610)])
def test_the_beta_end_that_reaches_the_training_noise_in_fewer_steps(steps, beta_end):
    np.testing.assert_allclose(np.log(linear(steps, beta_end=beta_end).gamma[-1]), np.log(4.39e-5), atol=0.03)


def test_keeping_the_betas_at_100_steps_would_leave_signal():
    np.testing.assert_allclose(linear(100).gamma[-1], 0.605, atol=5e-4)
    np.testing.assert_allclose(respace(linear(), 100).gamma[-1], linear().gamma[-1], rtol=1e-6)


def test_cosine_is_a_quarter_of_a_cosine_with_bounded_betas():
    schedule = cosine(1000)
    t = np.arange(1001)
    squared = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.gamma64[:-1], (squared / squared[0])[:-1], rtol=1e-9)
    np.testing.assert_allclose(schedule.beta.max(), 0.999, rtol=1e-6)


def test_a_schedule_can_be_made_from_its_levels_or_betas():
    schedule = quadratic(50)
    np.testing.assert_array_equal(from_gamma(schedule.gamma64).gamma64, schedule.gamma64)
    np.testing.assert_allclose(from_beta(schedule.beta).gamma64, schedule.gamma64, rtol=1e-6)


def test_a_schedule_is_immutable_and_copies_its_source():
    levels = np.array([1.0, 0.5, 0.1])
    schedule = from_gamma(levels)
    levels[1] = 0.9
    assert schedule.gamma64[1] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        schedule.gamma64[1] = 0.9


@pytest.mark.parametrize(
    "gamma, message",
    [
        ([0.9, 0.5], "start at 1"),
        ([1.0, 0.5, 0.5], "strictly decreasing"),
        ([1.0, 0.2, 0.5], "strictly decreasing"),
        ([1.0, 0.5, 0.0], "above 0"),
        ([1.0, 0.5, -0.1], "above 0"),
        ([1.0, np.nan], "strictly decreasing"),
        ([1.0], "at least 2"),
        ([[1.0, 0.5]], "vector"),
    ],
)
def test_invalid_levels_fail(gamma, message):
    with pytest.raises(ValueError, match=message):
        from_gamma(np.array(gamma))


@pytest.mark.parametrize("beta", [[0.0, 0.1], [0.1, 1.0], [0.1, -0.1], [0.5, 1.5]])
def test_betas_outside_0_to_1_fail(beta):
    with pytest.raises(ValueError, match="strictly decreasing"):
        from_beta(np.array(beta))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 77, 999, 1000])
@pytest.mark.parametrize("name", BUILDERS)
def test_respacing_preserves_both_ends_and_decreases_strictly(name, steps, spacing):
    training = BUILDERS[name](1000)
    short = respace(training, steps, spacing)
    assert short.num_steps == steps
    assert short.gamma64[0] == 1.0
    log_snr_min = training.gamma64[-1]
    if spacing != "uniform":  # nothing noisier than a log-SNR of -10.1, which `linear` does not reach
        log_snr_min = max(log_snr_min, 1 / (1 + np.exp(10.1)))
    np.testing.assert_allclose(short.gamma64[-1], log_snr_min, rtol=1e-12)
    assert np.all(np.diff(short.gamma64) < 0)
    if spacing != "uniform" and steps > 1:  # these start at the training schedule's first noisy level
        np.testing.assert_allclose(1 - short.gamma64[1], 1 - training.gamma64[1], rtol=1e-9)


def test_log_snr_spacing_is_even_in_log_snr():
    gamma = respace(linear(), 40, "log_snr").gamma64[1:]
    widths = np.diff(np.log(gamma / (1 - gamma)))
    np.testing.assert_allclose(widths, widths.mean(), rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 40, 999, 2000])
def test_uniform_spacing_strides_the_training_schedule(steps):
    training = linear()
    short = respace(training, steps, "uniform").gamma64
    index = np.searchsorted(-training.gamma64, -short)
    np.testing.assert_array_equal(training.gamma64[index], short)
    assert np.all(np.abs(np.diff(index) - 2000 / steps) <= 1)


def test_karras_spacing_is_equation_5():
    training, steps, rho = linear(), 18, 7
    sigma_min, sigma_max = (np.sqrt(1 / training.gamma64[t] - 1) for t in (1, -1))
    index = np.arange(steps)
    ramp = index / (steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    sigma = (sigma_max ** (1 / rho) + ramp) ** rho
    got = respace(training, steps, "karras").gamma64[:0:-1]
    np.testing.assert_allclose(np.sqrt(1 / got - 1), sigma, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("log_snr_min", "log_snr_max"), [(-8.0, 7.0), (-2.5, 4.0), (-10.0, None), (None, 3.0)]
)
def test_given_end_points_are_reached_and_gamma_decreases_from_one(log_snr_min, log_snr_max, steps, spacing):
    training = linear()
    short = respace(training, steps, spacing, log_snr_min=log_snr_min, log_snr_max=log_snr_max)
    assert short.num_steps == steps
    assert short.gamma64[0] == 1.0 and np.all(np.diff(short.gamma64) < 0)
    log_snr = np.log(short.gamma64[1:]) - np.log1p(-short.gamma64[1:])
    default = respace(training, steps, spacing).log_snr
    np.testing.assert_allclose(log_snr[-1], default[-1] if log_snr_min is None else log_snr_min, atol=1e-6)
    if steps > 1 and (log_snr_max is not None or spacing != "uniform"):
        np.testing.assert_allclose(log_snr[0], default[1] if log_snr_max is None else log_snr_max, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "beta_end"), [(1000, 0.0199), (250, 0.0781), (100, 0.188), (25, 0.610), (10, 0.970)]
)
def test_linear_spacing_has_linear_betas(steps, beta_end):
    short = respace(linear(), steps, "linear")
    np.testing.assert_allclose(short.beta[[0, -1]], [1e-6, beta_end], rtol=3e-3)
    np.testing.assert_allclose(np.diff(short.beta, 2), np.zeros(steps - 2), atol=1e-7)


def test_uniform_spacing_between_end_points_is_even_in_the_training_step():
    training = linear()
    known = np.log(training.gamma64[1:]) - np.log1p(-training.gamma64[1:])
    short = respace(training, 5, "uniform", log_snr_min=known[1599], log_snr_max=known[399]).gamma64
    np.testing.assert_allclose(short[1:], training.gamma64[[400, 700, 1000, 1300, 1600]], rtol=1e-9)
    without = respace(training, 5, "uniform", log_snr_min=known[1499]).gamma64
    np.testing.assert_allclose(without[1:], training.gamma64[[300, 600, 900, 1200, 1500]], rtol=1e-9)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ({"log_snr_min": -10.1}, "log_snr_min .*-10.034 to 13.816, got -10.1"),
        ({"log_snr_max": 13.9}, "log_snr_max must be .*, got 13.9"),
        ({"log_snr_min": float("nan")}, "log_snr_min must be .*, got nan"),
        ({"log_snr_min": 2.0, "log_snr_max": 1.0}, "log_snr_min .*1.000, got 2.000"),
        ({"log_snr_min": -1.0, "log_snr_max": -0.9}, "0.711 .*log_snr_min"),
    ],
)
def test_invalid_end_points_fail(ends, message):
    with pytest.raises(ValueError, match=message):
        respace(linear(), 5, "linear", **ends)


def test_respacing_errors_name_the_value():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        respace(linear(), 0)
    with pytest.raises(ValueError, match="at most the 2000 training steps, got num_steps=2001"):
        respace(linear(), 2001, "uniform")
    with pytest.raises(ValueError, match="one of log_snr, uniform, karras, linear, got 'even'"):
        respace(linear(), 10, "even")


# Steps of very different widths, so that the tests detect a uniform gamma or a skipped step.
UNEVEN = from_gamma(np.array([1.0, 0.98, 0.9, 0.55, 0.5, 0.05, 0.02]))


def position(gamma: jax.Array, schedule) -> np.ndarray:
    """The position of each gamma on the t axis, in [0, T], where p(gamma) is uniform."""
    levels = schedule.gamma64[::-1]
    return np.interp(np.asarray(gamma, np.float64), levels, np.arange(len(levels))[::-1])


def test_one_gamma_has_the_piecewise_uniform_distribution():
    keys = jax.random.split(jax.random.key(1), 60_000)
    gamma = jax.vmap(lambda key: sample_gamma(key, UNEVEN, 1))(keys)
    assert gamma.dtype == np.float32
    counts, _ = np.histogram(position(gamma, UNEVEN), bins=6 * 10, range=(0, 6))
    assert counts.sum() == gamma.size
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [4, 9])
def test_a_stratified_batch_has_the_same_distribution(batch_size):
    keys = jax.random.split(jax.random.key(2), 8000)
    gamma = jax.vmap(lambda key: sample_gamma(key, UNEVEN, batch_size))(keys)
    counts, _ = np.histogram(position(gamma, UNEVEN), bins=36, range=(0, 6))
    # Stratified counts scatter less than independent ones, so the chi-square bound is on the safe side.
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("batch_size", [1, 7, 16, 2000])
def test_every_slice_of_the_noise_levels_is_sampled_once(batch_size):
    schedule = linear()
    for seed in range(3):
        gamma = sample_gamma(jax.random.key(seed), schedule, batch_size)
        assert gamma.shape == (batch_size,)
        assert np.all((gamma <= 1) & (gamma >= schedule.gamma[-1]))
        # Near 1 a float32 gamma determines its position on the t axis only to within 0.1.
        slices = np.floor(position(gamma, schedule) * batch_size / 2000).astype(int)
        if batch_size <= 16:
            np.testing.assert_array_equal(np.sort(slices), np.arange(batch_size))
        else:
            assert np.abs(np.sort(slices) - np.arange(batch_size)).max() <= 1


def test_the_cleanest_interval_is_sampled():
    keys = jax.random.split(jax.random.key(3), 4000)
    gamma = jax.vmap(lambda key: sample_gamma(key, UNEVEN, 1))(keys)
    np.testing.assert_allclose(np.mean(gamma > UNEVEN.gamma[1]), 1 / 6, atol=0.025)
    assert gamma.max() > 0.9995


def test_gammas_differ_with_the_key_and_within_the_batch():
    first, second = (sample_gamma(jax.random.key(seed), linear(), 8) for seed in (0, 1))
    assert not np.any(first == second)
    assert len(np.unique(first)) == 8
    widths = position(first, linear()) * 8 / 2000 - np.arange(8)
    assert np.ptp(widths) > 0.1  # each example has its own jitter
