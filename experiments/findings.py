"""The paper's findings as a table, and whether collected results reproduce them.

A verdict rests on paired differences over the same images, with 95% intervals, at the models' default samplers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.tables import DISTANCES, SAMPLER, sampler

REPRODUCED, PARTLY, OPPOSITE, INCONCLUSIVE = "reproduced", "in part", "opposite", "inconclusive"
_LOWER, _HIGHER = -1, 1


@dataclass(frozen=True)
class Finding:
    """A finding of the paper, or of later work by its authors.

    Attributes:
        key: a short name, as used by the notes of `experiments.toml`.
        claim: the finding in words.
        shown: the difference that is shown, in words.
        run: the evaluation that decides it.
        contrast: which pairs of rows, 'a - b', are compared; see `collect.contrasts`.
        signs: {metric: sign that the shown difference must have}.
        flipped: whether b - a is shown.
        skip: methods that the finding does not concern.
    """

    key: str
    claim: str
    shown: str
    run: str
    contrast: str
    signs: Mapping[str, int]
    flipped: bool = False
    skip: tuple[str, ...] = ()


_LOWER_DISTANCES = dict.fromkeys(DISTANCES, _LOWER)
FINDINGS = (
    Finding(
        "distortion",
        "SR3 has lower PSNR and SSIM than the regression",
        "SR3 - regression",
        "evaluation",
        "regression - sr3",
        {"psnr": _LOWER, "ssim": _LOWER},
        flipped=True,
    ),
    Finding(
        "perception",
        "SR3 has better LPIPS and feature distances than the regression",
        "SR3 - regression",
        "evaluation",
        "regression - sr3",
        {"lpips": _LOWER, **_LOWER_DISTANCES},
        flipped=True,
    ),
    Finding(
        "patches",
        "The same, in the features of 64x64 patches",
        "SR3 - regression",
        "patches",
        "regression - sr3",
        _LOWER_DISTANCES,
        flipped=True,
    ),
    Finding(
        "consistency",
        "SR3 and the regression agree with the low-res image",
        "model - bicubic",
        "evaluation",
        "model - bicubic",
        {"consistency": _LOWER},
    ),
    Finding(
        "recognition_alexnet",
        "A linear probe on AlexNet recognizes SR3's outputs better than the regression's",
        "SR3 - regression",
        "recognition",
        "regression - sr3",
        {"top1": _HIGHER},
        flipped=True,
    ),
    Finding(
        "recognition_bicubic_alexnet",
        "A linear probe on AlexNet recognizes SR3's outputs better than bicubic's",
        "SR3 - bicubic",
        "recognition",
        "model - bicubic",
        {"top1": _HIGHER},
        skip=("regression",),
    ),
    Finding(
        "recognition",
        "A small classifier recognizes SR3's outputs better than the regression's",
        "SR3 - regression",
        "evaluation",
        "regression - sr3",
        {"top1": _HIGHER},
        flipped=True,
    ),
    Finding(
        "recognition_bicubic",
        "A small classifier recognizes SR3's outputs better than bicubic's",
        "SR3 - bicubic",
        "evaluation",
        "model - bicubic",
        {"top1": _HIGHER},
        skip=("regression",),
    ),
    Finding(
        "norm",
        "L1 gives slightly better feature distances than L2",
        "L1 - L2",
        "evaluation",
        "l1 - l2",
        _LOWER_DISTANCES,
    ),
    Finding(
        "diversity",
        "L1 gives less diverse outputs than L2, as in later work of the same group",
        "L1 - L2",
        "diversity",
        "l1 - l2",
        {"diversity": _LOWER, "diversity_lpips": _LOWER},
    ),
    Finding(
        "searched",
        "A searched schedule improves the ancestral sampler",
        "searched - default",
        "searched",
        "searched - default",
        {"lpips": _LOWER, **_LOWER_DISTANCES},
    ),
)
_COLUMNS = ["finding", *SAMPLER, "metric", "mean", "low", "high", "agrees", "decides"]


def differences(runs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Every difference that bears on a finding.

    Args:
        runs: {'evaluation': collected evaluation, ...} of one experiment.

    Returns:
        One line per finding, row and metric: the sampler of the row, the difference with its interval, `agrees`
        (1: the interval is on the claimed side of 0; -1: on the other side; 0: it contains 0) and whether it
        `decides` the verdict.
    """
    lines = [line for finding in FINDINGS for line in _lines(finding, runs.get(finding.run))]
    return pd.DataFrame(lines, columns=_COLUMNS).astype({"steps": "Int64"})


def _lines(finding: Finding, run: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if run is None:
        return []
    lines = []
    for pair in run["pairs"]:
        if pair["contrast"] != finding.contrast:
            continue
        # The row that varies: the model's, or SR3's where the other one is the regression.
        row = run["rows"][pair["b" if finding.contrast == "regression - sr3" else "a"]]
        if row["method"] in finding.skip:
            continue
        # Each model is evaluated with its default sampler, and the L1 variant only against L2.
        default = row["own"] and (row["method"] != "sr3_l1" or finding.contrast == "l1 - l2")
        shared = {key: row.get(key) for key in SAMPLER} | {"finding": finding.key}
        shared["decides"] = default or finding.contrast == "searched - default"
        for metric, sign in finding.signs.items():
            if (interval := pair["columns"].get(metric)) is None:
                continue
            low, mean, high = (interval[end] for end in ("low", "mean", "high"))
            if finding.flipped:
                low, mean, high = -high, -mean, -low
            agrees = sign * (int(low > 0) - int(high < 0))
            lines.append(
                shared | {"metric": metric, "mean": mean, "low": low, "high": high, "agrees": agrees}
            )
    if finding.key == "searched" and any(line["metric"] == "lpips" for line in lines):
        lines = [line for line in lines if line["metric"] == "lpips"]  # the metric that the search optimized
    if not any(line["decides"] for line in lines):  # no row has a default sampler: all of them count
        lines = [line | {"decides": True} for line in lines]
    return lines


def verdict(lines: pd.DataFrame) -> str:
    """The verdict on one finding from its differences; a metric that a deciding row lacks decides nothing."""
    deciding = lines[lines["decides"]]
    if deciding.empty:
        return ""
    names = deciding.apply(lambda row: f"{row['method']} {sampler(row)}", axis=1)
    agrees = deciding.assign(row=names).pivot_table(
        index="row", columns="metric", values="agrees", fill_value=0
    )
    if (agrees > 0).all(axis=None):
        return REPRODUCED
    if (agrees < 0).all(axis=None):
        return OPPOSITE
    return PARTLY if (agrees > 0).any(axis=None) else INCONCLUSIVE


def verdicts(frame: pd.DataFrame) -> dict[str, str]:
    """{finding key: verdict} of the findings that `differences` found data for."""
    return {str(key): verdict(lines) for key, lines in frame.groupby("finding", sort=False)}
