"""The search on an oracle whose every sampling is known in closed form, and its rules one by one."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import jax
import numpy as np
import pytest

from sr3_jax.diffusion.schedule import cosine, linear
from sr3_jax.sampling import SOLVERS, Sampling
from sr3_jax.search import successive_halving
from sr3_jax.search.successive_halving import Race, TimeUp, best, spread, steps_for

TRAINING = linear()
MEAN, DEVIATION = 0.3, 0.2
COUNTS = (8, 16, 32)


def exact(candidate: Sampling) -> float:
    """The Frechet distance between N(0.3, 0.2^2) and what the sampler makes of its perfect denoiser.

    E[y0 | y] is linear in y, so each step is, and the mean and variance of y are followed without drawing any.
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
    """The same as images tell it: the fewer, the less sure."""
    word = hashlib.sha256(f"{candidate} {count}".encode()).digest()
    return exact(candidate) * (1 + 0.3 * (word[0] / 255 - 0.5) / np.sqrt(count))


def race(solver: str = "ancestral", steps: int = 5, **settings) -> Race:
    return Race(TRAINING, Sampling(solver, steps), **settings)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
def test_it_finds_what_beats_the_defaults_and_the_papers_betas(solver, steps, seed):
    found, count = best(race(solver, steps), noisy, candidates=24, counts=COUNTS, seed=seed)
    assert count == 32 and found.steps == steps and found.solver == solver
    default, papers = Sampling(solver, steps), Sampling(solver, steps, "linear")
    assert exact(found) < 0.35 * exact(default)
    assert exact(found) < 0.35 * exact(papers)
    assert exact(papers) > 1e-4  # there was something to find


def recorded(score=noisy):
    asked: list[tuple[Sampling, int]] = []

    def scored(candidate: Sampling, count: int) -> float:
        asked.append((candidate, count))
        return score(candidate, count)

    return scored, asked


def test_the_better_half_goes_on_to_more_images(monkeypatch):
    monkeypatch.setattr(successive_halving, "REFINEMENTS", 0)
    scored, asked = recorded()
    found, _ = best(race(), scored, candidates=16, counts=COUNTS, seed=0)
    rounds = {count: [candidate for candidate, of in asked if of == count] for count in COUNTS}
    assert [len(set(of)) == len(of) for of in rounds.values()] == [True] * 3  # nothing is scored twice
    default = race().default
    assert all(of[0] == default for of in rounds.values())
    for few, many in ((8, 16), (16, 32)):
        order = sorted(rounds[few], key=lambda candidate: noisy(candidate, few))
        assert set(rounds[many]) == {default, *order[: (len(order) + 1) // 2]}
    assert len(rounds[8]) == 16
    assert found == min(rounds[32], key=lambda candidate: noisy(candidate, 32))


def test_small_steps_are_judged_on_all_images_and_help():
    scored, asked = recorded()
    found, _ = best(race("ddim", 4), scored, candidates=4, counts=(8, 16), seed=0)
    start = min(spread(race("ddim", 4), 4, seed=0), key=lambda candidate: noisy(candidate, 16))
    assert noisy(found, 16) < 0.5 * noisy(start, 16)
    assert {count for _, count in asked[7:]} == {16}


def test_the_same_seed_is_the_same_search():
    runs = [recorded() for _ in range(3)]
    for (scored, _), seed in zip(runs, (3, 3, 4), strict=True):
        best(race(), scored, candidates=12, counts=(8, 16), seed=seed)
    first, again, other = (asked for _, asked in runs)
    assert first == again != other


def test_the_default_wins_where_nothing_is_better():
    for score in (lambda candidate, count: 1.0, lambda candidate, count: float(candidate != race().default)):
        assert best(race(), score, candidates=12, counts=COUNTS, seed=0) == (race().default, 32)


def test_what_is_out_of_the_race_does_not_win():
    def score(candidate, count):
        return float("inf") if candidate.variance < 0.9 else exact(candidate)

    found, _ = best(race(), score, candidates=24, counts=COUNTS, seed=0)
    assert found.variance >= 0.9


@pytest.mark.parametrize("allowed", [0, 1, 10, 14, 20])
def test_when_time_is_up_the_most_images_decide(allowed):
    scored, asked = recorded()

    def limited(candidate, count):
        if len(asked) == allowed:
            raise TimeUp
        return scored(candidate, count)

    found, count = best(race(), limited, candidates=12, counts=COUNTS, seed=0)
    if not allowed:
        assert (found, count) == (race().default, 0)
        return
    most = max(of for _, of in asked)
    assert count == most
    assert found == min((c for c, of in asked if of == most), key=lambda candidate: noisy(candidate, most))


@pytest.mark.parametrize("schedule", [cosine(1000), linear(100)], ids=["cosine", "short"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_candidates_are_grids_of_the_schedule_that_all_differ(solver, steps, schedule):
    one = Race(schedule, Sampling(solver, steps))
    candidates = list(spread(one, 20, seed=0))
    assert candidates[0] == one.default and len(candidates) == 20
    tables = {
        b"".join(np.asarray(column).tobytes() for column in jax.tree.leaves(candidate.coefficients(schedule)))
        for candidate in candidates
    }
    assert len(tables) == 20
    assert {(candidate.solver, candidate.steps) for candidate in candidates} == {(solver, steps)}
    assert {(candidate.guidance, candidate.augment) for candidate in candidates} == {(1.0, 0.0)}
    if steps > 1:
        assert {candidate.spacing for candidate in candidates} == {None, *successive_halving.SPACINGS}


@pytest.mark.parametrize("seed", range(5))
def test_few_points_cover_every_number_well(seed):
    points = np.array(list(successive_halving._cover(6, 24, seed=seed)))
    assert points.min() >= 0 and points.max() < 1
    for column in points.T:
        counts, _ = np.histogram(column, bins=4, range=(0, 1))
        assert counts.min() >= 3 and counts.max() <= 9


def test_guidance_and_augment_are_searched_where_the_network_knows_them():
    one = race(augment=True, guidance=True)
    candidates = list(spread(one, 24, seed=0))
    assert len({candidate.guidance for candidate in candidates}) > 8
    assert {0.0} < {candidate.augment for candidate in candidates}
    assert all(1 <= candidate.guidance <= 4 and 0 <= candidate.augment <= 1 for candidate in candidates)

    def score(candidate, count):
        return abs(candidate.guidance - 2.5) + abs(candidate.augment - 0.2)

    found, _ = best(one, score, candidates=24, counts=(8,), seed=0)
    assert score(found, 8) < 0.4


def test_small_steps_stay_within_what_the_network_knows():
    def score(candidate, count):  # wants out of it at both ends
        low, high = (
            {"log_snr_min": -10.1, "log_snr_max": 13.8} | successive_halving._levels(race(), candidate)
        ).values()
        return low - high + 1e-3 * candidate.variance

    found, _ = best(race(), score, candidates=6, counts=(8,), seed=0)
    levels = found.grid(TRAINING).log_snr
    assert levels[-1] >= TRAINING.log_snr[-1] - 1e-5 and levels[1] <= TRAINING.log_snr[1] + 1e-5
    assert found.variance < 0.3


def test_heun_takes_two_evaluations_a_step():
    for solver in SOLVERS:
        for nfe in (1, 2, 5, 8, 25):
            steps = steps_for(solver, nfe)
            assert Sampling(solver, steps).nfe <= nfe
            assert replace(Sampling(solver, steps), steps=steps + 1).nfe > nfe
