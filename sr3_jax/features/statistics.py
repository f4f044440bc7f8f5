"""Statistics of features of image sets: mean and covariance, Frechet distance, KID, Inception score.

Shape legend: N images, D features, K classes. Everything is float64 NumPy on the host. All metrics depend on N (the
Frechet distance is biased upward unless N is far larger than D), so report N with them.
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
from sr3_jax.storage import atomic_write


@dataclass(frozen=True)
class FeatureProtocol:
    """How features are computed; metrics of different protocols are not comparable."""

    network: str  # for example 'inception-2015-12-05'
    distance: str  # name of a Frechet distance of these features; 'fid' only for FID's network
    weights_sha256: str
    preprocessing: str  # a description


@dataclass(frozen=True)
class Statistics:
    """Mean and scatter of N feature vectors."""

    protocol: FeatureProtocol
    count: int
    mean: np.ndarray  # [D] float64
    scatter: np.ndarray  # [D,D] float64: sum of the outer products of the deviations from the mean

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D,D]. UserError for fewer than 2 images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}: use more images")
        return self.scatter / (self.count - 1)


def statistics_of(features: np.ndarray, protocol: FeatureProtocol) -> Statistics:
    """Statistics of features [N,D], N >= 1. ValueError if a feature is not finite."""
    features = _finite(features)
    mean = features.mean(axis=0)
    deviations = features - mean[None]
    return Statistics(protocol, len(features), mean, deviations.T @ deviations)


def merged(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of the union of all parts, in any order (Chan, Golub and LeVeque 1979).

    For a stream use merged([so_far, statistics_of(batch, protocol)]), for several processes one part from each. The
    update is numerically stable for large means.

    Raises:
        UserError: there are no parts, or their protocols differ.
    """
    parts = list(parts)
    if not parts:
        raise UserError("there are no images for statistics: use at least two")
    return functools.reduce(_merge, parts)


def _merge(a: Statistics, b: Statistics) -> Statistics:
    _same_protocol(a, b)
    count = a.count + b.count
    shift = b.mean - a.mean
    mean = a.mean + shift * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count / count * b.count)
    return Statistics(a.protocol, count, mean, scatter)


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write statistics and protocol as an .npz file, atomically."""
    arrays: dict[str, Any] = {**asdict(statistics.protocol), "count": statistics.count}
    arrays |= {"mean": statistics.mean, "scatter": statistics.scatter}
    try:
        with atomic_write(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): use another path") from error


def load_statistics(path: Path) -> Statistics:
    """Read a file of `save_statistics`. UserError for any other file; no code in the file is run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [field.name for field in fields(FeatureProtocol)]
            protocol = FeatureProtocol(**{name: str(file[name]) for name in names})
            count, mean, scatter = int(file["count"]), file["mean"], file["scatter"]
    except OSError as error:
        raise UserError(
            f"reference statistics {path} cannot be read ({error.strerror or error}): check the path, or give a "
            "folder of images as folder:PATH"
        ) from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a file of reference statistics: make it again") from error
    if mean.ndim != 1 or scatter.shape != (mean.size, mean.size) or count < 1:
        raise UserError(f"{path} is not a file of reference statistics: make it again")
    return Statistics(protocol, count, _finite(mean[None])[0], _finite(scatter))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0: FID if the features are FID's.

    tr (A B)^(1/2) is computed as the sum of the singular values of A^(1/2) B^(1/2), which are real and accurate even if
    A and B are singular (N < D).

    Raises:
        UserError: fewer than 2 images, or different protocols.
    """
    _same_protocol(a, b)
    roots = _root(a.covariance), _root(b.covariance)
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; negative eigenvalues are rounding errors."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))[None]) @ vectors.T


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a metric over `parts` subsets or splits; deviation is None for one part."""

    mean: float
    deviation: float | None
    parts: int
    size: int  # images per part


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    seed: int,
    subsets: int = 100,
    subset_size: int = 1000,
    paired: bool = False,
) -> Spread:
    """KID (Binkowski et al. 2018): unbiased squared MMD of features [N,D] and [M,D], which may be negative.

    The kernel is (x.y / D + 1)^3. The result is the mean over `subsets` random subsets of each set, without
    replacement, or the value of all images if both sets have at most subset_size.

    Args:
        paired: row i of both sets belongs to the same image, such as an output and its ground truth. These pairs are
            left out, as they would reward closeness to the ground truth, and a perfect sampler would score below 0.

    Raises:
        UserError: fewer than 2 images in a set.
    """
    a, b = _finite(a), _finite(b)
    _same_width(a.shape[1], b.shape[1])
    least = min(len(a), len(b), subset_size)
    if least < 2:
        raise UserError(
            f"KID needs at least 2 images in each set, got {len(a)} and {len(b)}: use more images"
        )
    if max(len(a), len(b)) <= subset_size:
        return Spread(_discrepancy(a, b, paired=paired), None, 1, least)
    random = np.random.default_rng(seed)

    def subset() -> float:
        rows = random.choice(len(a), least, replace=False)
        other = rows if paired else random.choice(len(b), least, replace=False)
        return _discrepancy(a[rows], b[other], paired=paired)

    values = [subset() for _ in range(subsets)]
    return Spread(float(np.mean(values)), float(np.std(values)), subsets, least)


def _discrepancy(a: np.ndarray, b: np.ndarray, *, paired: bool) -> float:
    """Unbiased squared MMD, which excludes the kernel of an image with itself."""
    aa, bb, ab = ((x @ y.T / a.shape[1] + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))

    def without_diagonal(kernel: np.ndarray) -> float:
        return (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))

    between = without_diagonal(ab) if paired else ab.mean()
    return float(without_diagonal(aa) + without_diagonal(bb) - 2.0 * between)


def inception_score(logits: np.ndarray, *, splits: int = 10) -> Spread:
    """IS (Salimans et al. 2016) of logits [N,K], from 1 to K: exp E KL(p(class|image) || p(class)) in each split.

    Splits are contiguous, as in the code of Salimans et al., so shuffle images that are sorted by class.

    Raises:
        UserError: fewer than 2 images per split.
    """
    logits = _finite(logits)
    if splits < 1 or len(logits) < 2 * splits:
        raise UserError(
            f"an Inception score in {splits} splits needs at least {2 * max(splits, 1)} images, got "
            f"{len(logits)}: use more images or fewer splits"
        )
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    values = []
    for part in np.array_split(log_p, splits):
        p = np.exp(part)
        marginal = p.mean(axis=0, keepdims=True)
        # The term of a class with zero probability is 0 * log 0 = 0.
        log_marginal = np.log(np.maximum(marginal, np.finfo(np.float64).tiny))
        values.append(np.exp((p * (part - log_marginal)).sum(axis=1).mean()))
    deviation = float(np.std(values)) if splits > 1 else None
    return Spread(float(np.mean(values)), deviation, splits, len(logits) // splits)


def _finite(features: np.ndarray) -> np.ndarray:
    """[N,D] as float64; ValueError unless all are finite."""
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
        raise UserError(
            f"statistics of different features cannot be compared ({'; '.join(differences)}): use the same network"
        )
    _same_width(a.mean.size, b.mean.size)


def _same_width(a: int, b: int) -> None:
    if a != b:
        raise UserError(f"features of sizes {a} and {b} cannot be compared: use the same network")
