"""Successive halving on a toy problem whose objective is known in closed form."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import jax
import numpy as np
import pytest

from sr3_jax.diffusion.schedule import SPACINGS, cosine, linear
from sr3_jax.evaluation import candidates as searching
from sr3_jax.evaluation.candidates import (
    OutOfTime,
    SearchSpace,
    initial_candidates,
    minimize,
    steps_for,
)
from sr3_jax.sampling import SOLVERS, Sampling

TRAINING = linear()
MEAN, DEVIATION = 0.3, 0.2
ROUNDS = (8, 16, 32)


def exact(candidate: Sampling) -> float:
    """The Frechet distance between N(0.3, 0.2^2) and the sampler's output with the exact denoiser.

    E[y0 | y] is linear in y, and so is each step: the mean and variance of y are computed without samples.
    """
    table = candidate.coefficients(TRAINING)
    mean, variance = 0.0, 1.0
    columns = (
        np.asarray(column, np.float64) for column in (table.gamma, table.from_y0, table.from_y, table.noise)
    )
    for gamma, from_y0, from_y, noise in zip(*columns, strict=True):
        gain = np.sqrt(gamma) * DEVIATION**2 / (gamma * DEVIATION**2 + 1 - gamma)
        estimate = MEAN + gain * (mean - np.sqrt(gamma) * MEAN)
        mean = from_y0 * estimate + from_y * mean
        variance = (from_y0 * gain + from_y) ** 2 * variance + noise**2
    return (mean - MEAN) ** 2 + (np.sqrt(variance) - DEVIATION) ** 2


def noisy(candidate: Sampling, count: int) -> float:
    """The same with noise that decreases with the number of images."""
    word = hashlib.sha256(f"{candidate} {count}".encode()).digest()
    return exact(candidate) * (1 + 0.3 * (word[0] / 255 - 0.5) / np.sqrt(count))


def search_space(solver: str = "ancestral", steps: int = 5, **settings) -> SearchSpace:
    return SearchSpace(TRAINING, Sampling(solver, steps), **settings)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
def test_result_beats_the_default_and_linear_spacing(solver, steps, seed):
    found, count = minimize(search_space(solver, steps), noisy, candidates=24, rounds=ROUNDS, seed=seed)
    assert count == 32 and found.steps == steps and found.solver == solver
    default, linear_spacing = Sampling(solver, steps), Sampling(solver, steps, "linear")
    assert exact(found) < 0.35 * exact(default)
    assert exact(found) < 0.35 * exact(linear_spacing)
    assert exact(linear_spacing) > 1e-4  # there is something to find


def recorded(objective=noisy):
    calls: list[tuple[Sampling, int]] = []

    def scored(candidate: Sampling, count: int) -> float:
        calls.append((candidate, count))
        return objective(candidate, count)

    return scored, calls


def test_the_better_half_goes_on_to_the_next_round(monkeypatch):
    monkeypatch.setattr(searching, "REFINEMENTS", 0)
    scored, calls = recorded()
    found, _ = minimize(search_space(), scored, candidates=16, rounds=ROUNDS, seed=0)
    rounds = {count: [candidate for candidate, of in calls if of == count] for count in ROUNDS}
    assert [len(set(of)) == len(of) for of in rounds.values()] == [True] * 3  # nothing is evaluated twice
    default = search_space().default
    assert all(of[0] == default for of in rounds.values())
    for few, many in ((8, 16), (16, 32)):
        order = sorted(rounds[few], key=lambda candidate: noisy(candidate, few))
        assert set(rounds[many]) == {default, *order[: (len(order) + 1) // 2]}
    assert len(rounds[8]) == 16
    assert found == min(rounds[32], key=lambda candidate: noisy(candidate, 32))


def test_refinement_uses_all_images_and_helps():
    scored, calls = recorded()
    found, _ = minimize(search_space("ddim", 4), scored, candidates=4, rounds=(8, 16), seed=0)
    start = min(
        initial_candidates(search_space("ddim", 4), 4, seed=0), key=lambda candidate: noisy(candidate, 16)
    )
    assert noisy(found, 16) < 0.5 * noisy(start, 16)
    assert {count for _, count in calls[7:]} == {16}


def test_the_seed_determines_the_search():
    runs = [recorded() for _ in range(3)]
    for (scored, _), seed in zip(runs, (3, 3, 4), strict=True):
        minimize(search_space(), scored, candidates=12, rounds=(8, 16), seed=seed)
    first, again, other = (calls for _, calls in runs)
    assert first == again != other


def test_the_default_wins_if_nothing_is_better():
    for objective in (
        lambda candidate, count: 1.0,
        lambda candidate, count: float(candidate != search_space().default),
    ):
        assert minimize(search_space(), objective, candidates=12, rounds=ROUNDS, seed=0) == (
            search_space().default,
            32,
        )


def test_excluded_candidates_do_not_win():
    def objective(candidate, count):
        return float("inf") if candidate.variance < 0.9 else exact(candidate)

    found, _ = minimize(search_space(), objective, candidates=24, rounds=ROUNDS, seed=0)
    assert found.variance >= 0.9


@pytest.mark.parametrize("allowed", [0, 1, 10, 14, 20])
def test_out_of_time_the_round_with_most_images_decides(allowed):
    scored, calls = recorded()

    def limited(candidate, count):
        if len(calls) == allowed:
            raise OutOfTime
        return scored(candidate, count)

    found, count = minimize(search_space(), limited, candidates=12, rounds=ROUNDS, seed=0)
    if not allowed:
        assert (found, count) == (search_space().default, 0)
        return
    most = max(of for _, of in calls)
    assert count == most
    assert found == min((c for c, of in calls if of == most), key=lambda candidate: noisy(candidate, most))


@pytest.mark.parametrize("schedule", [cosine(1000), linear(100)], ids=["cosine", "short"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_initial_candidates_are_valid_and_all_differ(solver, steps, schedule):
    space = SearchSpace(schedule, Sampling(solver, steps))
    candidates = list(initial_candidates(space, 20, seed=0))
    assert candidates[0] == space.default and len(candidates) == 20
    tables = {
        b"".join(np.asarray(column).tobytes() for column in jax.tree.leaves(candidate.coefficients(schedule)))
        for candidate in candidates
    }
    assert len(tables) == 20
    assert {(candidate.solver, candidate.steps) for candidate in candidates} == {(solver, steps)}
    assert {(candidate.guidance, candidate.augment) for candidate in candidates} == {(1.0, 0.0)}
    if steps > 1:
        assert {candidate.spacing for candidate in candidates} == {None, *SPACINGS}


def test_guidance_and_augment_are_searched_if_the_network_supports_them():
    space = search_space(augment=True, guidance=True)
    candidates = list(initial_candidates(space, 24, seed=0))
    assert len({candidate.guidance for candidate in candidates}) > 8
    assert {0.0} < {candidate.augment for candidate in candidates}
    assert all(1 <= candidate.guidance <= 4 and 0 <= candidate.augment <= 1 for candidate in candidates)

    def objective(candidate, count):
        return abs(candidate.guidance - 2.5) + abs(candidate.augment - 0.2)

    found, _ = minimize(space, objective, candidates=24, rounds=(8,), seed=0)
    assert objective(found, 8) < 0.4


def test_refinement_stays_in_the_range_of_the_training_schedule():
    def objective(candidate, count):  # decreases beyond both ends
        levels = candidate.grid(TRAINING).log_snr
        return float(levels[-1] - levels[1]) + 1e-3 * candidate.variance

    found, _ = minimize(search_space(), objective, candidates=6, rounds=(8,), seed=0)
    levels = found.grid(TRAINING).log_snr
    assert levels[-1] >= TRAINING.log_snr[-1] - 1e-5 and levels[1] <= TRAINING.log_snr[1] + 1e-5
    assert found.variance < 0.3


def test_steps_are_the_most_within_the_budget():
    for solver in SOLVERS:
        for nfe in (1, 2, 5, 8, 25):
            steps = steps_for(solver, nfe)
            assert Sampling(solver, steps).nfe <= nfe
            assert replace(Sampling(solver, steps), steps=steps + 1).nfe > nfe
