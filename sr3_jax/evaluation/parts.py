"""What each process of an evaluation found, and all of it put together: scores of every image, figures of the set.

Shape legend: P images, S samples. A part is plain values, so that it goes from process to process in a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.cache import KeptFeatures
from sr3_jax.features.set_metrics import figures, figures_of_originals
from sr3_jax.features.statistics import FeatureProtocol, Statistics, statistics_of
from sr3_jax.files import write_text


@dataclass(frozen=True)
class Item:
    """An evaluated image: its place in the source, its name in files, and its size in the source."""

    index: int
    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Row:
    """One method's part: of each image its scores [S] (or [1]) by name, and keys of the features of its first output
    and of its original."""

    scores: Sequence[Mapping[str, Sequence[float]]]
    outputs: Sequence[Sequence[str]]
    originals: Sequence[Sequence[str]]
    reused: int


@dataclass(frozen=True)
class Part:
    """What one process found: its images, a row a method, and (index, 'NAME: reason') of what cannot be read."""

    items: Sequence[Item]
    rows: Sequence[Row]
    failed: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class SetMeter:
    """How features of the whole set are compared: `features` are kept by it, `logits` their last numbers.

    reference: what outputs are compared with; None for their own originals.
    """

    features: KeptFeatures
    protocol: FeatureProtocol
    logits: int = 0
    reference: Statistics | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All images together.

    Attributes:
        scores: of each method {name: float64 [P,S] or [P,1]}; only what was measured of every image.
        sets: of each method {name: {'mean', 'low', 'high'}}, figures of all images together.
        count: N of these figures: images, or their patches.
        left_out: {name: of how many images it could not be measured}.
        failed: 'NAME: reason' sentences.
        reused: outputs that were there already.
    """

    items: tuple[Item, ...]
    scores: tuple[Mapping[str, np.ndarray], ...]
    sets: tuple[Mapping[str, Mapping[str, float]], ...]
    count: int
    left_out: Mapping[str, int]
    failed: tuple[str, ...]
    reused: int


def write_part(folder: Path, part: Part, *, process: int) -> None:
    """Write what process number `process` found. UserError if it cannot be written."""
    write_text(_path(folder, process), json.dumps(dataclasses.asdict(part)))


def read_part(folder: Path, *, process: int) -> Part:
    """What process number `process` wrote."""
    values: dict[str, Any] = json.loads(_path(folder, process).read_text(encoding="utf-8"))
    items = [Item(**item) for item in values["items"]]
    return Part(items, [Row(**row) for row in values["rows"]], [tuple(pair) for pair in values["failed"]])


def combine(
    parts: Sequence[Part], source: str, *, originals: Sequence[bool], set_meter: SetMeter | None = None
) -> Evaluation:
    """The parts of all processes as one evaluation, images in the order of the source.

    Args:
        originals: for each row, whether its outputs are the originals themselves.

    Raises:
        UserError: no image of the source could be used.
    """
    failed = [reason for _, reason in sorted(pair for part in parts for pair in part.failed)]
    items = [item for part in parts for item in part.items]
    if not items:
        raise UserError(f"none of the images of {source} can be used; the first: {failed[0]}")
    order = sorted(range(len(items)), key=lambda at: items[at].index)

    def joined(field: str, row: int) -> list[Any]:
        values = [value for part in parts for value in getattr(part.rows[row], field)]
        return [values[at] for at in order]

    left_out: dict[str, int] = {}
    scores, sets = [], []
    for number, are_originals in enumerate(originals):
        rows = joined("scores", number)
        names = dict.fromkeys(name for row in rows for name in row)
        lacking = {name: sum(name not in row for row in rows) for name in names}
        left_out |= {name: count for name, count in lacking.items() if count}
        scores.append(
            {name: np.array([row[name] for row in rows], np.float64) for name in names if not lacking[name]}
        )
        outputs, reals = joined("outputs", number), joined("originals", number)
        sets.append(_figures(set_meter, outputs, reals, are_originals) if set_meter else {})
    reused = sum(row.reused for part in parts for row in part.rows)
    count = sum(map(len, joined("originals", 0)))
    ordered = tuple(items[at] for at in order)
    return Evaluation(ordered, tuple(scores), tuple(sets), count, left_out, tuple(failed), reused)


def reference_of(parts: Sequence[Part], row: int, set_meter: SetMeter) -> Statistics:
    """Statistics of the originals of one row, as a reference for other evaluations."""
    keys = [key for part in parts for of in part.rows[row].originals for key in of]
    features = set_meter.features.find(keys)
    return statistics_of(features[:, : features.shape[1] - set_meter.logits], set_meter.protocol)


def _figures(
    meter: SetMeter,
    outputs: Sequence[Sequence[str]],
    originals: Sequence[Sequence[str]],
    are_originals: bool,
) -> dict[str, Mapping[str, float]]:
    made, real = ([key for of in keys for key in of] for keys in (outputs, originals))
    if meter.features.missing([*made, *real]):  # some images are too small for the network
        return {}
    reals = meter.features.find(real)
    how: dict[str, Any] = {"logits": meter.logits, "reference": meter.reference}
    if len(real) > len(originals):
        how["images"] = np.repeat(np.arange(len(originals)), [len(of) for of in originals])
    if are_originals:
        return figures_of_originals(reals, meter.protocol, **how)
    return figures(meter.features.find(made), reals, meter.protocol, **how)


def _path(folder: Path, process: int) -> Path:
    return folder / f"part.{process}.json"
