"""A search over how a model is sampled: candidates, successive halving over images, then small steps. Pure.

The paper found its inference schedules by a search on held-out data (section 4, appendix) and does not say how. Here
a race is run for each solver at a fixed number of network evaluations. Its candidates are the solver's defaults and
points that cover end points, spacing and variance evenly. All are scored on a few images; the better half goes on
to twice as many; the last one is moved along each number, by ever smaller steps, as long as that helps. Every
candidate sees the same images and the same noise, so that few images tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from sr3_jax.diffusion.schedule import LEAST_LOG_SNR, SPACINGS, NoiseSchedule
from sr3_jax.errors import UserError
from sr3_jax.sampling import Sampling

Score = Callable[[Sampling, int], float]
"""(candidate, images) -> its score on the first so many images: lower is better, inf is out of the race.

It may raise TimeUp instead.
"""

REFINEMENTS = 3  # passes of small steps, each of half the width of the one before
LEAST_WIDTH = 0.15  # of the known log-SNRs, between the ends of a grid
GUIDANCE = (1.0, 4.0)


class TimeUp(Exception):
    """There is no time for another score."""


@dataclass(frozen=True)
class Race:
    """What is searched.

    Attributes:
        schedule: the training schedule.
        default: the solver's own grid at these evaluations: scored on all images and never worse than the result.
        augment, guidance: whether the network knows these, so that they are searched too.
    """

    schedule: NoiseSchedule
    default: Sampling
    augment: bool = False
    guidance: bool = False

    @property
    def known(self) -> tuple[float, float]:
        """The lowest and the highest log-SNR that a grid may have."""
        highest, lowest = (float(x) for x in self.schedule.log_snr[[1, -1]])
        return max(lowest, min(LEAST_LOG_SNR, highest)), highest


def steps_for(solver: str, evaluations: int) -> int:
    """The most steps of a solver within so many network evaluations; Heun's take two each, the last one."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


def best(
    race: Race, score: Score, *, candidates: int, counts: Sequence[int], seed: int
) -> tuple[Sampling, int]:
    """The best sampling of a race, and the number of images that say so.

    Args:
        candidates: how many start.
        counts: images of each round, rising.

    After TimeUp: the best of those that were scored on the most images; (default, 0) where none was.
    """
    scores: dict[int, dict[Sampling, float]] = {}

    def scored(candidate: Sampling, count: int) -> float:
        found = scores.setdefault(count, {})
        if candidate not in found:
            found[candidate] = score(candidate, count)
        return found[candidate]

    try:
        winner = _halved(list(spread(race, candidates, seed=seed)), scored, counts, kept=race.default)
        _refine(race, winner, lambda candidate: scored(candidate, counts[-1]))
    except TimeUp:
        pass
    counts = [count for count, found in scores.items() if found]
    if not counts:
        return race.default, 0
    last = max(counts)
    # The first of equals: a candidate that only equals the default, which comes first, does not replace it.
    order = sorted(scores[last], key=lambda candidate: candidate != race.default)
    return min(order, key=scores[last].__getitem__), last


def _halved(candidates: list[Sampling], score: Score, counts: Sequence[int], *, kept: Sampling) -> Sampling:
    for count in counts:
        # The one that is kept is scored first, so that it is there when time is up.
        candidates = [kept, *(candidate for candidate in candidates if candidate != kept)]
        candidates.sort(key=lambda candidate: score(candidate, count))
        winner = candidates[0]
        candidates = candidates[: math.ceil(len(candidates) / 2)]
    return winner


def spread(race: Race, count: int, *, seed: int) -> Iterator[Sampling]:
    """The default, the other spacings and variances between its ends, and points that cover the rest evenly.

    Up to `count` in all that differ in what they compute and that the training schedule has.
    """
    seen: set[bytes] = set()
    for candidate in _tried(race, seed=seed, most=10 * count):
        try:
            table = jax.tree.leaves(candidate.coefficients(race.schedule))
        except UserError:  # no such grid
            continue
        other = np.array([candidate.augment, candidate.guidance])
        what = b"".join(np.asarray(column).tobytes() for column in (*table, other))
        if what not in seen and len(seen) < count:
            seen.add(what)
            yield candidate


def _tried(race: Race, *, seed: int, most: int) -> Iterator[Sampling]:
    default = race.default
    yield default
    yield from (replace(default, spacing=spacing) for spacing in SPACINGS)
    if default.solver == "ancestral":
        yield from (replace(default, variance=variance) for variance in (0.0, 0.5))
    if default.solver == "ddim":
        yield from (replace(default, eta=eta) for eta in (1.0, 0.5))
    low, high = race.known
    for spacing, log_snr_min, log_snr_max, noise, augment, guidance in _cover(6, most, seed=seed):
        start = low + log_snr_min * (high - low) / 2
        end = start + (LEAST_WIDTH + (1 - LEAST_WIDTH) * log_snr_max) * (high - start)
        moved = replace(
            default,
            spacing=SPACINGS[int(spacing * len(SPACINGS))],
            log_snr_min=round(start, 3),
            log_snr_max=round(min(end, high), 3),
        )
        if default.solver == "ancestral":
            moved = replace(moved, variance=round(noise, 3))
        if default.solver == "ddim":  # a third without noise
            moved = replace(moved, eta=round(max(0.0, 1.5 * noise - 0.5), 3))
        if race.augment:  # half without; little is better than much
            moved = replace(moved, augment=round(max(0.0, 2 * augment - 1) ** 2, 3))
        if race.guidance:
            moved = replace(moved, guidance=round(GUIDANCE[0] + guidance**2 * (GUIDANCE[1] - GUIDANCE[0]), 3))
        yield moved


def _cover(dimensions: int, count: int, *, seed: int) -> Iterator[list[float]]:
    """Points of the unit cube, any number of which lie evenly: multiples of powers of a generalised golden ratio."""
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    start = np.random.Generator(np.random.Philox(key=seed)).random(dimensions)
    for number in range(count):
        yield [float(x) for x in (start + number * steps) % 1.0]


def _refine(race: Race, winner: Sampling, score: Callable[[Sampling], float]) -> None:
    """Move one number at a time while that helps; `score` keeps what it finds."""
    low, high = race.known
    levels = _levels(race, winner)
    here = winner
    widths = {
        "log_snr_min": 0.1 * (high - low),
        "log_snr_max": 0.1 * (high - low),
        "variance": 0.2,
        "eta": 0.2,
    }
    widths |= {"augment": 0.1, "guidance": 0.5}
    limits = {"log_snr_min": (low, high), "log_snr_max": (low, high), "guidance": (1.0, math.inf)}
    names = ["log_snr_min", *(["log_snr_max"] if winner.steps > 1 else [])]
    names += {"ancestral": ["variance"], "ddim": ["eta"]}.get(winner.solver, []) if winner.steps > 1 else []
    names += [name for name in ("augment", "guidance") if getattr(race, name)]
    for halvings in range(REFINEMENTS):
        for name in names:
            for sign in (1, -1):
                least, most = limits.get(name, (0.0, 1.0))
                now = getattr(here, name) if getattr(here, name) is not None else levels[name]
                value = min(max(now + sign * widths[name] / 2**halvings, least), most)
                moved = replace(here, **{name: round(value, 3)})
                if value == now or not _fits(race, moved):
                    continue
                if score(moved) < score(here):
                    here = moved
                    break


def _levels(race: Race, candidate: Sampling) -> dict[str, float]:
    """The end points of a candidate's grid, where it names none."""
    levels = candidate.grid(race.schedule).log_snr
    return {"log_snr_min": float(levels[-1]), "log_snr_max": float(levels[1])}


def _fits(race: Race, candidate: Sampling) -> bool:
    try:
        candidate.grid(race.schedule)
    except UserError:
        return False
    return True
