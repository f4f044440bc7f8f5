"""What a table says of a set of images by their features: Frechet distance, KID, Inception score, with intervals.

Shape legend: N images, or patches of images, D features, K logits. Row i of two sets is of the same image:
outputs and their originals.
Every figure is {'mean', 'low', 'high'}: the figure of all images, and about it 1.96 of its standard deviations.
(Not percentiles of resamples: an image drawn twice spreads less, which moves such distances, not only their spread.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sr3_jax.features.statistics import (
    FeatureProtocol,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    statistics_of,
)

RESAMPLES = 50
HALVINGS = 20  # of the originals, to compare them with themselves
WIDEST = 512  # features; resamples of more take too long, and such figures have no interval
SUBSET = 1000  # images; a KID of more is the mean over subsets of so many
SPLITS = 10  # of an Inception score
NORMAL = 1.96  # standard deviations on each side of 95% of a normal distribution
KID_UNIT = 1e3

Figure = Mapping[str, float]


def keys(protocol: FeatureProtocol) -> tuple[str, str, str]:
    """The columns of Frechet distance, KID and Inception score; 'fid' and 'kid' for FID's own network alone."""
    if protocol.distance == "fid":
        return "fid", "kid", "inception_score"
    name = protocol.distance.removeprefix("frechet_")
    return protocol.distance, f"kid_{name}", f"inception_score_{name}"


def figures(
    outputs: np.ndarray,
    originals: np.ndarray,
    protocol: FeatureProtocol,
    *,
    images: np.ndarray | None = None,
    logits: int = 0,
    reference: Statistics | None = None,
) -> dict[str, Figure]:
    """Of outputs [N,D+K] beside their originals, or beside a reference, of which KID knows too little.

    `images` [N] says of which image each row is a patch: images are drawn again, not patches. Empty for fewer
    than 2 images.
    """
    rows = _rows_of(images, len(outputs))
    if len(rows) < 2:
        return {}
    frechet, kid, score = keys(protocol)
    (a, guesses), (b, _) = (_split(features, logits) for features in (outputs, originals))

    def distance(some: np.ndarray) -> float:
        real = reference or statistics_of(b[some], protocol)
        return frechet_distance(statistics_of(a[some], protocol), real)

    found = {frechet: _with_interval(distance, rows, resampled=a.shape[1] <= WIDEST)}
    if reference is None:
        found[kid] = kernel_figure(a, b, images=images)
    if logits and len(a) >= 2 * SPLITS:
        found[score] = _score(guesses)
    return found


def figures_of_originals(
    originals: np.ndarray,
    protocol: FeatureProtocol,
    *,
    images: np.ndarray | None = None,
    logits: int = 0,
    reference: Statistics | None = None,
) -> dict[str, Figure]:
    """Originals [N,D+K] beside a reference, else a random half of the images beside the other.

    Of halves the mean over HALVINGS, and 95% of them. Empty for fewer than 4 images.
    """
    rows = _rows_of(images, len(originals))
    if len(rows) < 4:
        return {}
    frechet, kid, score = keys(protocol)
    features, guesses = _split(originals, logits)
    found: dict[str, Figure] = {}
    if reference is not None:
        beside = figures(originals, originals, protocol, images=images, logits=logits, reference=reference)
        found[frechet] = beside[frechet]
    else:
        draw, values = np.random.default_rng(0), []
        for _ in range(HALVINGS if features.shape[1] <= WIDEST else 1):
            order, half = draw.permutation(len(rows)), len(rows) // 2
            parts = [
                features[np.concatenate([rows[at] for at in some])]
                for some in (order[:half], order[half : 2 * half])
            ]
            squared = kernel_distance(parts[0], parts[1], seed=0, subsets=1, subset_size=SUBSET).mean
            apart = frechet_distance(*(statistics_of(part, protocol) for part in parts))
            values.append((apart, KID_UNIT * squared))
        for key, of in zip((frechet, kid), np.array(values).T, strict=True):
            low, high = np.quantile(of, [0.025, 0.975])
            found[key] = {"mean": float(of.mean()), "low": float(low), "high": float(high)}
    if logits and len(features) >= 2 * SPLITS:
        found[score] = _score(guesses)
    return found


def kernel_figure(a: np.ndarray, b: np.ndarray, *, images: np.ndarray | None = None) -> Figure:
    """KID of outputs and originals [N,D], in units of 1e-3.

    Up to SUBSET rows the interval is of resamples of the images; of more, of the subsets, whose deviation is
    that of the whole but for the root of the ratio of their sizes.
    """
    spread = kernel_distance(a, b, seed=0, subset_size=SUBSET)
    if spread.deviation is None:
        kernels = [_kernel_between_others(x, y) for x, y in ((a, a), (b, b), (a, b))]
        draw, values, rows = np.random.default_rng(0), [], _rows_of(images, len(a))
        for _ in range(RESAMPLES):
            times = np.bincount(_redrawn(draw, rows), minlength=len(a)).astype(np.float64)
            pairs = times.sum() ** 2 - (times**2).sum()  # of different rows
            if pairs:
                aa, bb, ab = (times @ kernel @ times / pairs for kernel in kernels)
                values.append(aa + bb - 2 * ab)
        deviation = float(np.std(values, ddof=1))
    else:
        deviation = spread.deviation * (spread.size / len(a)) ** 0.5
    middle = KID_UNIT * spread.mean
    half = KID_UNIT * NORMAL * deviation
    return {"mean": middle, "low": middle - half, "high": middle + half}


def _kernel_between_others(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel [N,N], zero between an image and itself."""
    kernel = (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1.0) ** 3
    np.fill_diagonal(kernel, 0.0)
    return kernel


def _rows_of(images: np.ndarray | None, count: int) -> list[np.ndarray]:
    """The rows of each image."""
    if images is None:
        return list(np.arange(count)[:, None])
    return [np.flatnonzero(images == image) for image in np.unique(images)]


def _redrawn(draw: np.random.Generator, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of as many images as there are, drawn with replacement."""
    return np.concatenate([rows[at] for at in draw.integers(0, len(rows), len(rows))])


def _with_interval(
    distance: Callable[[np.ndarray], float], rows: Sequence[np.ndarray], *, resampled: bool
) -> Figure:
    """A distance of all rows and, if `resampled`, an interval by that of resamples of the images."""
    middle, draw = distance(np.concatenate(rows)), np.random.default_rng(0)
    if not resampled:
        return {"mean": middle}
    values = [distance(_redrawn(draw, rows)) for _ in range(RESAMPLES)]
    half = NORMAL * float(np.std(values, ddof=1))
    return {"mean": middle, "low": max(0.0, middle - half), "high": middle + half}


def _score(logits: np.ndarray) -> Figure:
    """In random order: data sets are often sorted by class, and splits are runs of neighbours."""
    order = np.random.default_rng(0).permutation(len(logits))
    spread = inception_score(logits[order], splits=SPLITS)
    half = NORMAL * (spread.deviation or 0.0) / SPLITS**0.5
    return {"mean": spread.mean, "low": spread.mean - half, "high": spread.mean + half}


def _split(features: np.ndarray, logits: int) -> tuple[np.ndarray, np.ndarray]:
    """[N,D+K] -> [N,D] and [N,K]."""
    width = features.shape[1] - logits
    return features[:, :width], features[:, width:]
