"""Resamples of distances between sets of images, the same for every method: intervals of their differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.features import set_metrics
from sr3_jax.features.cache import FeatureCache
from sr3_jax.features.statistics import FeatureProtocol, frechet_distance, statistics_of
from sr3_jax.files import sha256_hex

SET_RESAMPLES = 50


def set_draws(folder: Path, found: Mapping[str, Any], of: np.ndarray) -> list[dict[str, list[float]]]:
    """For each row {column: [resamples]}, the Frechet distance and KID of resamples, the same for every row.

    Those of Frechet distances are biased, but alike: of use for the spread of differences alone. Empty for rows
    without features, such as the originals, and where images have unlike numbers of patches.
    """
    rows, about = found["rows"], found["protocol"].get("features")
    draws: list[dict[str, list[float]]] = [{} for _ in rows]
    if not about or about["count"] % about["images"]:
        return draws
    patches = about["count"] // about["images"]
    protocol = FeatureProtocol(
        network=about["network"],
        distance=about["distance"],
        weights_sha256=about["sha256"],
        preprocessing=about["preprocessing"],
    )
    kept = FeatureCache.for_protocol(folder / "outputs", protocol)
    names = [image["name"] for image in found["images"]]
    of = np.repeat(of, patches)
    members = [np.flatnonzero(of == one) for one in range(of.max() + 1)]
    draw = np.random.default_rng(0).integers(0, len(members), (SET_RESAMPLES, len(members)))
    resamples = [np.concatenate([members[one] for one in some]) for some in draw]
    frechet, kid, _ = set_metrics.metric_keys(protocol)
    real: list[Any] = []
    for row, into in zip(rows, draws, strict=True):
        digests = {}
        if row["method"] != "ground truth":
            digests = _digests(_folder(folder / "outputs", row), names)
        try:
            features, originals = (
                kept.get([key for name in names for key in _keys(digests[name][at], patches)])
                for at in (0, 1)
            )
        except KeyError:
            continue
        real = real or [statistics_of(originals[some], protocol) for some in resamples]
        into[frechet] = [
            frechet_distance(statistics_of(features[some], protocol), one)
            for some, one in zip(resamples, real, strict=True)
        ]
        into[kid] = _kernel_draws(features, originals, resamples)
    return draws


def _kernel_draws(a: np.ndarray, b: np.ndarray, resamples: Sequence[np.ndarray]) -> list[float]:
    """KID of resamples of the rows of [N,D] and [N,D], but for what the second alone adds, the same for all rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    within, across = ((a @ x.T / a.shape[1] + 1.0) ** 3 for x in (a, b))
    np.fill_diagonal(within, 0.0)
    np.fill_diagonal(across, 0.0)
    draws = []
    for some in resamples:
        times = np.bincount(some, minlength=len(a)).astype(np.float64)
        pairs = times.sum() ** 2 - (times**2).sum()  # of different rows
        draws.append(set_metrics.KID_UNIT * float(times @ (within - 2.0 * across) @ times / pairs))
    return draws


def _folder(outputs: Path, row: Mapping[str, Any]) -> Path:
    """Where the outputs of a row are, as `methods.Method.folder` says it."""
    if not row["solver"]:
        return outputs / row["method"] / f"{row['scale']}x"
    plain = outputs / row["method"] / f"{row['solver']}-{row['steps']}"
    if not row.get("detail"):
        return plain
    searched = sorted(plain.parent.glob(f"{plain.name}-*"))  # by a digest of the sampling
    return searched[0] if len(searched) == 1 else plain / "not known"


def _keys(image: str, patches: int) -> list[str]:
    """The keys of an image's features, as `method_runner.feature_keys` makes them."""
    return [image] if patches == 1 else [sha256_hex({image: patch}) for patch in range(patches)]


def _digests(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{image: (digest of its first output, of its original)}, the latest of each."""
    known: dict[str, tuple[str, str]] = {}
    wanted = set(names)
    for path in sorted(folder.glob("scores*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # half a line of a killed run
            if entry["sample"] == 0 and entry["image"] in wanted:
                known[entry["image"]] = (entry["output"], entry["ground_truth"])
    return known
