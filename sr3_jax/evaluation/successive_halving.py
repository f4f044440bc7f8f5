"""The search for a sampling schedule: successive halving over candidates, then local refinement. Pure.

The paper searches its inference schedules by FID on held-out data (section 2.4) and does not describe the search.
Here each solver is searched at a fixed budget of network function evaluations (NFE). The candidates are the solver's
defaults and points that cover end points, spacing and variance evenly. In the first round all are evaluated on a few
images; the better half goes on to a round with more images, and so on. The winner is then moved along one setting at
a time, by smaller and smaller steps, while that helps. Every candidate sees the same images and the same noise, so
that few images suffice to distinguish candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from sr3_jax.diffusion.schedule import LEAST_LOG_SNR, SPACINGS, NoiseSchedule
from sr3_jax.diffusion.solvers import solver_options
from sr3_jax.errors import UserError
from sr3_jax.sampling import Sampling

Objective = Callable[[Sampling, int], float]
"""(candidate, images) -> a value on the first images: lower is better, infinity excludes the candidate.

It may raise OutOfTime instead.
"""

REFINEMENTS = 3  # passes of refinement; each halves the steps of the one before
MIN_WIDTH = 0.15  # of a grid in log-SNR, relative to the range of the training schedule
GUIDANCE = (1.0, 4.0)


class OutOfTime(Exception):
    """There is no time for another evaluation of the objective."""


@dataclass(frozen=True)
class SearchSpace:
    """The sampling settings to search.

    Attributes:
        schedule: the training schedule.
        default: the solver with its own grid, at the steps of the budget. It takes part in every round, so that the
            result is never worse.
        augment, guidance: whether the network supports these settings, so that they are searched too.
    """

    schedule: NoiseSchedule
    default: Sampling
    augment: bool = False
    guidance: bool = False

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """The lowest and the highest log-SNR that a grid may have."""
        highest, lowest = (float(x) for x in self.schedule.log_snr[[1, -1]])
        return max(lowest, min(LEAST_LOG_SNR, highest)), highest


def steps_for(solver: str, nfe: int) -> int:
    """The most steps of a solver within a budget of NFE; at least 1."""
    return max((steps for steps in range(1, nfe + 1) if Sampling(solver, steps).nfe <= nfe), default=1)


def minimize(
    space: SearchSpace, objective: Objective, *, candidates: int, rounds: Sequence[int], seed: int
) -> tuple[Sampling, int]:
    """The best sampling, and the number of images it was selected on.

    Args:
        candidates: how many take part in the first round.
        rounds: the number of images of each round, increasing.

    Out of time, the best of those evaluated on the most images; (default, 0) if there is none.
    """
    values: dict[int, dict[Sampling, float]] = {}

    def evaluate(candidate: Sampling, count: int) -> float:
        found = values.setdefault(count, {})
        if candidate not in found:
            found[candidate] = objective(candidate, count)
        return found[candidate]

    try:
        winner = _halve(
            list(initial_candidates(space, candidates, seed=seed)), evaluate, rounds, space.default
        )
        _refine(space, winner, lambda candidate: evaluate(candidate, rounds[-1]))
    except OutOfTime:
        pass
    counts = [count for count, found in values.items() if found]
    if not counts:
        return space.default, 0
    most = max(counts)
    # A candidate that is only as good as the default does not replace it.
    order = sorted(values[most], key=lambda candidate: candidate != space.default)
    return min(order, key=values[most].__getitem__), most


def _halve(
    candidates: list[Sampling], evaluate: Objective, rounds: Sequence[int], default: Sampling
) -> Sampling:
    for count in rounds:
        # The default first: it must have a value if time runs out.
        candidates = [default, *(candidate for candidate in candidates if candidate != default)]
        candidates.sort(key=lambda candidate: evaluate(candidate, count))
        winner = candidates[0]
        candidates = candidates[: math.ceil(len(candidates) / 2)]
    return winner


def initial_candidates(space: SearchSpace, count: int, *, seed: int) -> Iterator[Sampling]:
    """The default, other spacings and variances with its end points, and points that cover the rest evenly.

    At most `count`, all valid for the training schedule and no two equivalent.
    """
    seen: set[bytes] = set()
    for candidate in _proposals(space, seed=seed, most=10 * count):
        try:
            table = jax.tree.leaves(candidate.coefficients(space.schedule))
        except UserError:  # the schedule has no such grid
            continue
        other = np.array([candidate.augment, candidate.guidance])
        values = b"".join(np.asarray(column).tobytes() for column in (*table, other))
        if values not in seen and len(seen) < count:
            seen.add(values)
            yield candidate


def _proposals(space: SearchSpace, *, seed: int, most: int) -> Iterator[Sampling]:
    default = space.default
    yield default
    yield from (replace(default, spacing=spacing) for spacing in SPACINGS)
    options = solver_options(default.solver)
    if "variance" in options:
        yield from (replace(default, variance=variance) for variance in (0.0, 0.5))
    if "eta" in options:
        yield from (replace(default, eta=eta) for eta in (1.0, 0.5))
    low, high = space.log_snr_range
    for spacing, log_snr_min, log_snr_max, noise, augment, guidance in _even_points(6, most, seed=seed):
        start = low + log_snr_min * (high - low) / 2
        end = start + (MIN_WIDTH + (1 - MIN_WIDTH) * log_snr_max) * (high - start)
        moved = replace(
            default,
            spacing=SPACINGS[int(spacing * len(SPACINGS))],
            log_snr_min=round(start, 3),
            log_snr_max=round(min(end, high), 3),
        )
        if "variance" in options:
            moved = replace(moved, variance=round(noise, 3))
        if "eta" in options:  # a third of them without noise
            moved = replace(moved, eta=round(max(0.0, 1.5 * noise - 0.5), 3))
        if space.augment:  # half of them without; small values are more promising
            moved = replace(moved, augment=round(max(0.0, 2 * augment - 1) ** 2, 3))
        if space.guidance:
            moved = replace(moved, guidance=round(GUIDANCE[0] + guidance**2 * (GUIDANCE[1] - GUIDANCE[0]), 3))
        yield moved


def _even_points(dimensions: int, count: int, *, seed: int) -> Iterator[list[float]]:
    """A low-discrepancy sequence in the unit cube: multiples of powers of a generalized golden ratio."""
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    start = np.random.Generator(np.random.Philox(key=seed)).random(dimensions)
    for number in range(count):
        yield [float(x) for x in (start + number * steps) % 1.0]


def _refine(space: SearchSpace, winner: Sampling, evaluate: Callable[[Sampling], float]) -> None:
    """Move one setting at a time while that helps; `evaluate` records the results."""
    low, high = space.log_snr_range
    ends = _log_snr_ends(space, winner)
    current = winner
    widths = {
        "log_snr_min": 0.1 * (high - low),
        "log_snr_max": 0.1 * (high - low),
        "variance": 0.2,
        "eta": 0.2,
        "augment": 0.1,
        "guidance": 0.5,
    }
    limits = {"log_snr_min": (low, high), "log_snr_max": (low, high), "guidance": (1.0, math.inf)}
    names = ["log_snr_min", *(["log_snr_max"] if winner.steps > 1 else [])]
    options = solver_options(winner.solver)
    names += [name for name in ("variance", "eta") if name in options and winner.steps > 1]
    names += [name for name in ("augment", "guidance") if getattr(space, name)]
    for halvings in range(REFINEMENTS):
        for name in names:
            for sign in (1, -1):
                least, most = limits.get(name, (0.0, 1.0))
                now = getattr(current, name) if getattr(current, name) is not None else ends[name]
                value = min(max(now + sign * widths[name] / 2**halvings, least), most)
                moved = replace(current, **{name: round(value, 3)})
                if value == now or not _is_valid(space, moved):
                    continue
                if evaluate(moved) < evaluate(current):
                    current = moved
                    break


def _log_snr_ends(space: SearchSpace, candidate: Sampling) -> dict[str, float]:
    """The end points of a candidate's grid, for those that it does not set itself."""
    levels = candidate.grid(space.schedule).log_snr
    return {"log_snr_min": float(levels[-1]), "log_snr_max": float(levels[1])}


def _is_valid(space: SearchSpace, candidate: Sampling) -> bool:
    try:
        candidate.grid(space.schedule)
    except UserError:
        return False
    return True
