"""Metrics of a set of images by their features: Frechet distance, KID and Inception score, with intervals.

Shape legend: N images or patches of images, D features, K logits. Row i of the outputs and row i of the ground
truth belong to the same image. Every value is {'mean', 'low', 'high'}: the value over all images, and 1.96 standard
deviations on either side. (Percentiles of resamples would be biased: an image that is sampled twice reduces the
spread of the set, which shifts these distances.)
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
HALVINGS = 20  # random halves of the ground truth, compared with each other
MAX_WIDTH = 512  # features; resampling more takes too long, and the value then has no interval
SUBSET = 1000  # images; KID of more is the mean over subsets of this size
SPLITS = 10  # of the Inception score
NORMAL = 1.96  # standard deviations on either side of a 95% interval of a normal distribution
KID_UNIT = 1e3

Interval = Mapping[str, float]


def metric_keys(protocol: FeatureProtocol) -> tuple[str, str, str]:
    """The keys of Frechet distance, KID and Inception score; 'fid' and 'kid' only for FID's own network."""
    if protocol.distance == "fid":
        return "fid", "kid", "inception_score"
    name = protocol.distance.removeprefix("frechet_")
    return protocol.distance, f"kid_{name}", f"inception_score_{name}"


def output_metrics(
    outputs: np.ndarray,
    ground_truth: np.ndarray | None,
    protocol: FeatureProtocol,
    *,
    images: np.ndarray | None = None,
    logits: int = 0,
    reference: Statistics | None = None,
    reference_features: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Metrics of outputs [N,D+K] against their ground truth [N,D+K], or against a reference.

    Empty for fewer than 2 images. Without KID if only the statistics of the reference are known.

    Args:
        images: [N] the image of each row, if rows are patches: intervals then resample images, not patches.
        logits: K, the last columns, from which the Inception score is computed.
        reference: statistics to compare with instead of those of the ground truth, which can then be None.
        reference_features: [M,D+K] of the images that the reference was made of.
    """
    rows = _rows_by_image(images, len(outputs))
    if len(rows) < 2:
        return {}
    frechet, kid, score = metric_keys(protocol)
    a, a_logits = _split(outputs, logits)
    real = reference_features if reference is not None else ground_truth
    b = None if real is None else _split(real, logits)[0]

    def distance(sample: np.ndarray) -> float:
        compared = reference
        if compared is None:
            assert b is not None  # the ground truth
            compared = statistics_of(b[sample], protocol)
        return frechet_distance(statistics_of(a[sample], protocol), compared)

    found = {frechet: _with_interval(distance, rows, resample=a.shape[1] <= MAX_WIDTH)}
    if b is not None:
        found[kid] = kernel_distance_interval(a, b, images=images, paired=reference is None)
    if logits and len(a) >= 2 * SPLITS:
        found[score] = _inception_score_interval(a_logits)
    return found


def ground_truth_metrics(
    ground_truth: np.ndarray,
    protocol: FeatureProtocol,
    *,
    images: np.ndarray | None = None,
    logits: int = 0,
    reference: Statistics | None = None,
    reference_features: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Metrics of the ground truth [N,D+K] against a reference, or of one random half against the other.

    For halves: the mean over HALVINGS and the interval that holds 95% of them. Empty for fewer than 4 images. The
    arguments are those of `output_metrics`.
    """
    rows = _rows_by_image(images, len(ground_truth))
    if len(rows) < 4:
        return {}
    frechet, kid, score = metric_keys(protocol)
    features, class_logits = _split(ground_truth, logits)
    found: dict[str, Interval] = {}
    if reference is not None:
        whole = output_metrics(
            ground_truth,
            None,
            protocol,
            images=images,
            logits=logits,
            reference=reference,
            reference_features=reference_features,
        )
        found |= {key: whole[key] for key in (frechet, kid) if key in whole}
    else:
        generator, values = np.random.default_rng(0), []
        for _ in range(HALVINGS if features.shape[1] <= MAX_WIDTH else 1):
            order, half = generator.permutation(len(rows)), len(rows) // 2
            parts = [
                features[np.concatenate([rows[i] for i in indices])]
                for indices in (order[:half], order[half : 2 * half])
            ]
            squared = kernel_distance(parts[0], parts[1], seed=0, subsets=1, subset_size=SUBSET).mean
            between = frechet_distance(*(statistics_of(part, protocol) for part in parts))
            values.append((between, KID_UNIT * squared))
        for key, column in zip((frechet, kid), np.array(values).T, strict=True):
            low, high = np.quantile(column, [0.025, 0.975])
            found[key] = {"mean": float(column.mean()), "low": float(low), "high": float(high)}
    if logits and len(features) >= 2 * SPLITS:
        found[score] = _inception_score_interval(class_logits)
    return found


def kernel_distance_interval(
    a: np.ndarray, b: np.ndarray, *, images: np.ndarray | None = None, paired: bool = True
) -> Interval:
    """KID of features [N,D] of outputs and [M,D] of the images they are compared with, in units of 1e-3.

    If both sets have up to SUBSET rows, the interval comes from resamples of the images. Otherwise it comes from the
    subsets: their standard deviation, scaled by the square root of the ratio of sizes, estimates that of the whole.

    Args:
        images: [N] the image of each row of `a`.
        paired: row i of `b` is the ground truth of row i of `a`: the pairs (i,i) are left out, and both are resampled
            together.
    """
    spread = kernel_distance(a, b, seed=0, subset_size=SUBSET, paired=paired)
    if spread.deviation is None:
        aa, bb, ab = (_kernel_without_diagonal(x, y, paired or x is y) for x, y in ((a, a), (b, b), (a, b)))
        generator, values, rows = np.random.default_rng(0), [], _rows_by_image(images, len(a))
        others = list(np.arange(len(b))[:, None])
        for _ in range(RESAMPLES):
            of_a = np.bincount(_resample(generator, rows), minlength=len(a)).astype(np.float64)
            of_b = of_a
            if not paired:
                of_b = np.bincount(_resample(generator, others), minlength=len(b)).astype(np.float64)
            # The number of pairs of different rows.
            pairs_a, pairs_b = (weights.sum() ** 2 - (weights**2).sum() for weights in (of_a, of_b))
            between = pairs_a if paired else of_a.sum() * of_b.sum()
            if pairs_a and pairs_b:
                within = of_a @ aa @ of_a / pairs_a + of_b @ bb @ of_b / pairs_b
                values.append(within - 2 * (of_a @ ab @ of_b) / between)
        deviation = float(np.std(values, ddof=1))
    else:
        deviation = spread.deviation * (spread.size / min(len(a), len(b))) ** 0.5
    mean = KID_UNIT * spread.mean
    half = KID_UNIT * NORMAL * deviation
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _kernel_without_diagonal(x: np.ndarray, y: np.ndarray, same: bool) -> np.ndarray:
    """KID's kernel [N,M]; zero on the diagonal if the same row of both is the same image."""
    kernel = (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1.0) ** 3
    if same:
        np.fill_diagonal(kernel, 0.0)
    return kernel


def _rows_by_image(images: np.ndarray | None, count: int) -> list[np.ndarray]:
    """The row indices of each image."""
    if images is None:
        return list(np.arange(count)[:, None])
    return [np.flatnonzero(images == image) for image in np.unique(images)]


def _resample(generator: np.random.Generator, rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of a bootstrap resample of the images."""
    return np.concatenate([rows[i] for i in generator.integers(0, len(rows), len(rows))])


def _with_interval(
    distance: Callable[[np.ndarray], float], rows: Sequence[np.ndarray], *, resample: bool
) -> Interval:
    """The distance of all rows and, if `resample`, an interval from resamples of the images."""
    mean, generator = distance(np.concatenate(rows)), np.random.default_rng(0)
    if not resample:
        return {"mean": mean}
    values = [distance(_resample(generator, rows)) for _ in range(RESAMPLES)]
    half = NORMAL * float(np.std(values, ddof=1))
    return {"mean": mean, "low": max(0.0, mean - half), "high": mean + half}


def _inception_score_interval(logits: np.ndarray) -> Interval:
    """In random order: data sets are often sorted by class, and a split is a run of similar images."""
    order = np.random.default_rng(0).permutation(len(logits))
    spread = inception_score(logits[order], splits=SPLITS)
    half = NORMAL * (spread.deviation or 0.0) / SPLITS**0.5
    return {"mean": spread.mean, "low": spread.mean - half, "high": spread.mean + half}


def _split(features: np.ndarray, logits: int) -> tuple[np.ndarray, np.ndarray]:
    """[N,D+K] -> [N,D] and [N,K]."""
    width = features.shape[1] - logits
    return features[:, :width], features[:, width:]
