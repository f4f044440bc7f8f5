"""Metrics of whole sets of images (Frechet distance, KID, Inception score) against a reference set, without pairs.

Shape legend: N images or patches, F features of an image with the logits of its class.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax import __version__
from sr3_jax.data.sources import Source, open_source
from sr3_jax.errors import UserError
from sr3_jax.evaluation import results
from sr3_jax.evaluation.cache import FeatureCache
from sr3_jax.evaluation.outputs import unique_labels
from sr3_jax.features import set_metrics
from sr3_jax.features.metric_suite import MetricSuite, feature_keys, open_suite, stack_padded
from sr3_jax.features.networks import Network
from sr3_jax.features.statistics import Statistics, statistics_of
from sr3_jax.files import make_folder, sha256_hex, to_json
from sr3_jax.image_io.image_file import ImageError
from sr3_jax.numerics import fixed_numerics
from sr3_jax.storage import as_path

_log = logging.getLogger("sr3_jax")
_BATCH = 8  # images or patches of one size
_KINDS = ("photos", "tfds", "folder", "pairs")


@dataclass(frozen=True, eq=False)
class SetFeatures:
    """Features float32 [N,F] of a set, and [N] the index of the image of each row."""

    features: np.ndarray
    images: np.ndarray

    @property
    def count(self) -> int:
        """The number of images."""
        return len(np.unique(self.images))

    def statistics(self, network: Network) -> Statistics:
        """Mean and covariance of the features, without the logits."""
        width = self.features.shape[1] - network.logits
        return statistics_of(self.features[:, :width], network.protocol)


def is_source(name: str) -> bool:
    """Whether the name of a reference is that of a data source, not of a file of statistics."""
    return name.partition(":")[0] in _KINDS


def set_features(
    source: Source | str,
    network: Network,
    folder: Path,
    *,
    limit: int | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> SetFeatures:
    """The features of every image of a source, from the cache of features in `folder` where possible.

    Images that cannot be read are left out with a warning.

    Raises:
        UserError: the source does not exist, or fewer than 2 images are left.
    """
    source = (
        open_source(source, min_side=network.least_side, cache_mb=0) if isinstance(source, str) else source
    )
    cache = FeatureCache(folder, network.protocol)
    hashes: list[str] = []
    images: list[int] = []
    waiting: dict[str, np.ndarray] = {}

    def flush() -> None:
        if waiting:
            rows = network.run(stack_padded(list(waiting.values()), _BATCH))
            cache.add(list(waiting), rows[: len(waiting)])
            waiting.clear()

    for index in range(min(len(source), limit or len(source))):
        try:
            image = source[index]["image"]
        except ImageError as error:
            _log.warning("skipped: %s", error)
            continue
        patches = network.patches(image)
        keys = feature_keys(sha256_hex(image), len(patches))
        hashes += keys
        images += [index] * len(keys)
        for key, patch in zip(keys, patches, strict=True):
            if cache.missing([key]) and key not in waiting:
                if waiting and next(iter(waiting.values())).shape != patch.shape:
                    flush()
                waiting[key] = patch
                if len(waiting) == _BATCH:
                    flush()
        on_image()
    flush()
    if len(set(images)) < 2:
        raise UserError(
            f"{source.name} has {len(set(images))} usable images: metrics of sets need at least 2"
        )
    return SetFeatures(cache.get(hashes), np.array(images))


@fixed_numerics()
def evaluate_sets(
    outputs: Mapping[str, str | Path],
    reference: str | Path,
    output_dir: str | Path,
    *,
    features: str | None = None,
    classifier: str | None = None,
    patch: int = 0,
    limit: int | None = None,
    command: Sequence[str] = (),
    on_image: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[Path]]:
    """Compare sets of images with a reference set: every image of a folder counts, and names do not matter.

    Args:
        outputs: folders of images by the name of the program that made them.
        reference: the name of a data source, such as folder:PATH, or a file of statistics.
        output_dir: gets evaluation.json, .md and .csv, and the cache of features.
        features, classifier, patch: as for `evaluate`; the features cannot be none.
        limit: only the first images of each folder.
        command: the command line, for evaluation.json.
        on_image: called after each image.

    Returns:
        The content of evaluation.json, and the written files.

    Raises:
        UserError: an argument is invalid, a set has too few images, or a file cannot be written.
    """
    from_source = is_source(os.fspath(reference))
    suite = open_suite(
        features=features,
        classifier=classifier,
        patch=patch,
        reference=None if from_source else Path(reference),
    )
    network = suite.network
    if network is None:
        raise UserError(
            f"reference={reference} needs features: {suite.omitted[0] if suite.omitted else 'set features'}"
        )
    folder = make_folder(as_path(output_dir))
    if from_source:
        suite = with_reference(suite, os.fspath(reference), folder / "outputs", on_image=on_image)
    rows: list[dict[str, Any]] = []
    for label, path in zip(unique_labels((), outputs), outputs.values(), strict=True):
        found = set_features(f"folder:{path}", network, folder / "outputs", limit=limit, on_image=on_image)
        summary = set_metrics.output_metrics(
            found.features,
            None,
            network.protocol,
            images=found.images,
            logits=network.logits,
            reference=suite.reference,
            reference_features=suite.reference_features,
        )
        row: dict[str, Any] = dict.fromkeys((*results.ROW_KEYS, "detail"))
        row |= {"method": label, "folder": os.fspath(path), "count": found.count, "images": {}}
        rows.append(row | {"summary": {key: to_json(interval) for key, interval in summary.items()}})
    sets = [{"label": row["method"], "folder": row.pop("folder"), "images": row.pop("count")} for row in rows]
    report: dict[str, Any] = {
        "format": results.FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": {"sr3_jax": __version__},
        "protocol": {"sets": sets, "features": results.features_protocol(suite, count=0, images=0)},
        "models": [],
        "rows": rows,
    }
    report["protocol"]["sentences"] = results.protocol(report)
    return report, results.write_tables(folder, report)


def with_reference(
    suite: MetricSuite, name: str, folder: Path, *, on_image: Callable[[], None] = lambda: None
) -> MetricSuite:
    """The metrics with the images of a data source as reference set, whose features are cached in `folder`.

    Raises:
        UserError: there is no network for its features, or the source has too few images.
    """
    if suite.network is None:
        raise UserError(f"reference={name} needs features: omit --features=none, or install '.[metrics]'")
    found = set_features(name, suite.network, folder, on_image=on_image)
    return replace(
        suite,
        reference=found.statistics(suite.network),
        reference_features=found.features,
        reference_name=name,
    )
