"""Bootstrap resamples of distances between image sets, paired across methods: the spread of their differences.

Reads the cached features of an evaluation's outputs, whose layout belongs to `sr3_jax.evaluation`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.evaluation.cache import FeatureCache
from sr3_jax.features import set_metrics as package
from sr3_jax.features.metric_suite import feature_keys
from sr3_jax.features.statistics import FeatureProtocol, frechet_distance, statistics_of

RESAMPLES = 50


def set_metrics(
    folder: Path, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], group_of: np.ndarray
) -> list[dict[str, list[float]]]:
    """For each row {metric: [values of the resamples]} of the Fréchet distance and KID; all rows share the resamples.

    The Fréchet distances of resamples are biased, equally for all rows: use them only for the spread of differences.
    Rows without features (ground truth) are empty, and so are all rows if images have different numbers of patches.

    Args:
        folder: of the evaluation, with its `outputs`.
        found: the parsed evaluation.json.
        rows: its rows.
        group_of: [N] the index of the group that each image belongs to.
    """
    features = found["protocol"].get("features")
    values: list[dict[str, list[float]]] = [{} for _ in rows]
    if not features or features["count"] % features["images"]:
        return values
    patches = features["count"] // features["images"]
    protocol = FeatureProtocol(
        network=features["network"],
        distance=features["distance"],
        weights_sha256=features["sha256"],
        preprocessing=features["preprocessing"],
    )
    cache = FeatureCache(folder / "outputs", protocol)
    names = [image["name"] for image in found["images"]]
    group_of = np.repeat(group_of, patches)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    chosen_groups = np.random.default_rng(0).integers(0, len(members), (RESAMPLES, len(members)))
    resamples = [np.concatenate([members[group] for group in row]) for row in chosen_groups]
    frechet, kid, _ = package.metric_keys(protocol)
    truth: list[Any] = []
    for row, into in zip(rows, values, strict=True):
        hashes = {}
        if row["method"] != "ground truth":
            hashes = _output_hashes(_folder(folder / "outputs", row), names)
        try:
            outputs, ground_truth = (
                cache.get([key for name in names for key in feature_keys(hashes[name][place], patches)])
                for place in (0, 1)
            )
        except KeyError:
            continue
        truth = truth or [statistics_of(ground_truth[chosen], protocol) for chosen in resamples]
        into[frechet] = [
            frechet_distance(statistics_of(outputs[chosen], protocol), statistics)
            for chosen, statistics in zip(resamples, truth, strict=True)
        ]
        into[kid] = kernel_distances(outputs, ground_truth, resamples)
    return values


def kernel_distances(a: np.ndarray, b: np.ndarray, resamples: Sequence[np.ndarray]) -> list[float]:
    """KID of resampled rows of [N,D] and [N,D], without the term of b only, which is the same for all methods."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    within, across = ((a @ x.T / a.shape[1] + 1.0) ** 3 for x in (a, b))
    np.fill_diagonal(within, 0.0)
    np.fill_diagonal(across, 0.0)
    values = []
    for chosen in resamples:
        times = np.bincount(chosen, minlength=len(a)).astype(np.float64)
        pairs = times.sum() ** 2 - (times**2).sum()  # pairs of different rows
        values.append(package.KID_UNIT * float(times @ (within - 2.0 * across) @ times / pairs))
    return values


def _folder(outputs: Path, row: Mapping[str, Any]) -> Path:
    """The folder with the outputs of a row, as the evaluation names it."""
    if not row["solver"]:
        return outputs / row["method"] / f"{row['scale']}x"
    default = outputs / row["method"] / f"{row['solver'].replace(':', '_')}-{row['steps']}"
    if not row.get("detail"):
        return default
    searched = sorted(default.parent.glob(f"{default.name}-*"))  # named by a hash of the sampling
    return searched[0] if len(searched) == 1 else default / "unknown"


def _output_hashes(folder: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{image: (hash of its first output, hash of its ground truth)}; of several entries the last one."""
    known: dict[str, tuple[str, str]] = {}
    wanted = set(names)
    for path in sorted(folder.glob("scores*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the half-written last line of a killed run
            if entry["sample"] == 0 and entry["image"] in wanted:
                known[entry["image"]] = (entry["output"], entry["ground_truth"])
    return known
