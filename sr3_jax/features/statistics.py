"""What is computed of many images' features: mean and covariance, Frechet distance, KID, Inception score.

Shape legend: N images, D features, K classes. All of it is NumPy in float64, on the host. Every figure depends on
N (the Frechet distance is biased upwards where N is not far above D), so report N beside it.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.files import atomic_write


@dataclass(frozen=True)
class FeatureProtocol:
    """Which features these are: figures of two protocols are not to be compared."""

    network: str  # such as 'inception-2015-12-05'
    distance: str  # what a Frechet distance of these features is called; 'fid' only for that network
    weights_sha256: str
    preprocessing: str  # in words


@dataclass(frozen=True)
class Statistics:
    """Mean and spread of N feature vectors, of which none is kept."""

    protocol: FeatureProtocol
    count: int
    mean: np.ndarray  # [D] float64
    scatter: np.ndarray  # [D,D] float64: the sum over images of the outer product of their deviations

    @property
    def covariance(self) -> np.ndarray:
        """[D,D], unbiased. UserError for fewer than 2 images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}: take more")
        return self.scatter / (self.count - 1)


def statistics_of(features: np.ndarray, protocol: FeatureProtocol) -> Statistics:
    """Of features [N,D], N >= 1. ValueError if one of them is not finite."""
    features = _finite(features)
    mean = features.mean(axis=0)
    deviations = features - mean[None]
    return Statistics(protocol, len(features), mean, deviations.T @ deviations)


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Of all the images of the parts together, in any order (Chan, Golub and LeVeque 1979).

    For a stream: merged([so_far, statistics_of(batch, protocol)]); for processes: one part from each. Nothing is
    lost to cancellation, however large the mean. UserError if there is no part, or if protocols differ.
    """
    parts = list(parts)
    if not parts:
        raise UserError("there are no images to take statistics of: name at least two")
    return functools.reduce(_merge, parts)


def _merge(a: Statistics, b: Statistics) -> Statistics:
    _same_protocol(a, b)
    count = a.count + b.count
    shift = b.mean - a.mean
    mean = a.mean + shift * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count / count * b.count)
    return Statistics(a.protocol, count, mean, scatter)


def save_statistics(path: Path, statistics: Statistics) -> None:
    """One .npz with the protocol in it, written whole or not at all."""
    arrays: dict[str, Any] = {**asdict(statistics.protocol), "count": statistics.count}
    arrays |= {"mean": statistics.mean, "scatter": statistics.scatter}
    try:
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name a place that can") from error


def load_statistics(path: Path) -> Statistics:
    """What save_statistics wrote. UserError for anything else; no code in the file is run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [field.name for field in fields(FeatureProtocol)]
            protocol = FeatureProtocol(**{name: str(file[name]) for name in names})
            count, mean, scatter = int(file["count"]), file["mean"], file["scatter"]
    except OSError as error:
        raise UserError(f"reference statistics {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no reference statistics of ours: make it anew") from error
    if mean.ndim != 1 or scatter.shape != (mean.size, mean.size) or count < 1:
        raise UserError(f"{path} holds no reference statistics of ours: make it anew")
    return Statistics(protocol, count, _finite(mean[None])[0], _finite(scatter))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0: FID if the features are FID's.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2), which are real and of full precision even
    where N < D makes A and B singular. UserError for fewer than 2 images and for unequal protocols.
    """
    _same_protocol(a, b)
    roots = _root(a.covariance), _root(b.covariance)
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues below 0 are rounding errors of 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))[None]) @ vectors.T


@dataclass(frozen=True)
class Spread:
    """A figure's mean over `parts` subsets or splits, and their standard deviation: None where there is one part."""

    mean: float
    deviation: float | None
    parts: int
    size: int  # images in a part


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, seed: int, subsets: int = 100, subset_size: int = 1000
) -> Spread:
    """KID (Binkowski et al. 2018): squared MMD of features [N,D] and [M,D], unbiased, may be below 0.

    Kernel (x.y / D + 1)^3. The mean over `subsets` random subsets of each set without replacement; of all images,
    once, where both sets have no more than subset_size. UserError for fewer than 2 images.
    """
    a, b = _finite(a), _finite(b)
    _same_width(a.shape[1], b.shape[1])
    least = min(len(a), len(b), subset_size)
    if least < 2:
        raise UserError(f"KID needs at least 2 images of each kind, got {len(a)} and {len(b)}: take more")
    if max(len(a), len(b)) <= subset_size:
        return Spread(_discrepancy(a, b), None, 1, least)
    random = np.random.default_rng(seed)
    values = [
        _discrepancy(*(x[random.choice(len(x), least, replace=False)] for x in (a, b)))
        for _ in range(subsets)
    ]
    return Spread(float(np.mean(values)), float(np.std(values)), subsets, least)


def _discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD: an image's kernel with itself is left out."""
    aa, bb, ab = ((x @ y.T / a.shape[1] + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb))
    return float(within - 2.0 * ab.mean())


def inception_score(logits: np.ndarray, *, splits: int = 10) -> Spread:
    """IS (Salimans et al. 2016) of logits [N,K], from 1 to K: exp E KL(p(class|image) || p(class)) in each split.

    Splits are runs of neighbours, as in the paper's code, so shuffle images that are sorted by class. UserError
    for fewer than 2 images a split.
    """
    logits = _finite(logits)
    if splits < 1 or len(logits) < 2 * splits:
        raise UserError(
            f"an Inception score in {splits} splits needs at least {2 * max(splits, 1)} images, got "
            f"{len(logits)}: take more images or fewer splits"
        )
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    values = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        marginal = p.mean(axis=0, keepdims=True)
        # Where a class has no probability at all its term is 0 * log 0 = 0.
        log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
        values.append(np.exp((p * (part - log_marginal)).sum(axis=1).mean()))
    deviation = float(np.std(values)) if splits > 1 else None
    return Spread(float(np.mean(values)), deviation, splits, len(logits) // splits)


def _finite(features: np.ndarray) -> np.ndarray:
    """[N,D] in float64."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) == 0 or not np.isfinite(features).all():
        raise ValueError(f"features must be finite numbers [N,D], N at least 1; got shape {features.shape}")
    return features


def _same_protocol(a: Statistics, b: Statistics) -> None:
    if a.protocol != b.protocol:
        differences = [
            f"{field.name} {getattr(a.protocol, field.name)!r} and {getattr(b.protocol, field.name)!r}"
            for field in fields(FeatureProtocol)
            if getattr(a.protocol, field.name) != getattr(b.protocol, field.name)
        ]
        raise UserError(f"statistics of different features cannot be compared ({'; '.join(differences)})")
    _same_width(a.mean.size, b.mean.size)


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features of {a} and of {b} numbers cannot be compared: take both from one network")
