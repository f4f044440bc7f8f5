"""What is measured of each output: scores by their names in a table, each with the key of the network behind it.

Shape legend: B batch, H x W an original, h x w its low-res image, S samples of one input. Images are uint8
NumPy arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sr3_jax.evaluation import scoring
from sr3_jax.features.lpips import LEAST_SIDE, Lpips

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Measure:
    """Scores of outputs, one by one.

    Attributes:
        key: says what computes them; scores of another key are other scores.
        run: (outputs [B,H,W,3], originals [B,H,W,3], low_res [B,h,w,3], labels int [B]) -> {name: float [B]}.
        least_side: pixels; a smaller image is not measured.
        labelled: `run` uses the labels, which are zeros otherwise.
        of_originals: an original may stand for an output, and says how good one can get.
    """

    key: str
    run: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Columns]
    least_side: int = 0
    labelled: bool = False
    of_originals: bool = False

    def key_for(self, label: int) -> str:
        """The key of its scores of an image with that label."""
        return f"{self.key} label {label}" if self.labelled else self.key

    def fits(self, image: np.ndarray) -> bool:
        """Whether it can be measured of an image [H,W,3]."""
        return min(image.shape[:2]) >= self.least_side


@dataclass(frozen=True, eq=False)
class SpreadMeasure:
    """Scores of all samples of one input together; `run` takes them as [S,H,W,3], S at least 2."""

    key: str
    run: Callable[[np.ndarray], Mapping[str, float]]
    least_side: int = 0


def plain() -> Measure:
    """The scores that need no network: `scoring.score`."""

    def run(outputs: np.ndarray, originals: np.ndarray, low_res: np.ndarray, labels: np.ndarray) -> Columns:
        return scoring.score(outputs, originals, low_res)

    return Measure(f"plain {scoring.REVISION}", run)


def perceptual(lpips: Lpips) -> Measure:
    """LPIPS to the original."""

    def run(outputs: np.ndarray, originals: np.ndarray, low_res: np.ndarray, labels: np.ndarray) -> Columns:
        return {"lpips": np.asarray(lpips.distance(outputs, originals))}

    return Measure(f"lpips {lpips.sha256}", run, least_side=LEAST_SIDE)


def pixel_spread() -> SpreadMeasure:
    """Diversity: the standard deviation over samples (n - 1), in levels of 255, averaged over pixels and channels."""

    def run(samples: np.ndarray) -> Mapping[str, float]:
        return {"diversity": float(np.std(samples.astype(np.float32), axis=0, ddof=1).mean(dtype=np.float64))}

    return SpreadMeasure("spread 1", run)


def perceptual_spread(lpips: Lpips, *, batch: int = 1) -> SpreadMeasure:
    """Mean LPIPS between the pairs of samples of one input, `batch` pairs at a time."""

    def run(samples: np.ndarray) -> Mapping[str, float]:
        pairs = list(itertools.combinations(range(len(samples)), 2))
        found: list[float] = []
        for start in range(0, len(pairs), batch):
            some = pairs[start : start + batch]
            a, b = (filled([samples[pair[side]] for pair in some], batch) for side in (0, 1))
            found += np.asarray(lpips.distance(a, b))[: len(some)].tolist()
        return {"diversity_lpips": float(np.mean(found))}

    return SpreadMeasure(f"spread lpips {lpips.sha256}", run, least_side=LEAST_SIDE)


def filled(images: Sequence[np.ndarray | np.generic], batch: int) -> np.ndarray:
    """Arrays of one shape as [batch,...], filled up with copies of the last: another shape compiles anew."""
    return np.stack([*images, *[images[-1]] * (batch - len(images))])
