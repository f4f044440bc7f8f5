"""Verdicts follow the intervals of paired differences at the models' default samplers."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.findings import FINDINGS, differences, verdicts

HIGHER, LOWER, UNCLEAR = (0.5, 1.0, 2.0), (-2.0, -1.0, -0.5), (-1.0, 0.1, 1.0)


def row(method: str, *, steps: int | None = 5, own: bool = True, detail: str = "") -> dict[str, Any]:
    solver = "ddim" if steps else None
    return {"method": method, "solver": solver, "steps": steps, "own": own, "detail": detail}


def run(rows: list[dict[str, Any]], *pairs: tuple[int, int, str, dict[str, tuple[float, float, float]]]):
    """An evaluation with these differences (low, mean, high) between its rows."""
    ends = ("low", "mean", "high")
    return {
        "rows": rows,
        "pairs": [
            {
                "a": a,
                "b": b,
                "contrast": contrast,
                "columns": {key: dict(zip(ends, of, strict=True)) for key, of in columns.items()},
            }
            for a, b, contrast, columns in pairs
        ],
    }


def verdict(runs: dict[str, Any], key: str) -> str:
    return verdicts(differences(runs))[key]


@pytest.mark.parametrize(
    ("psnr", "ssim", "expected"),
    [
        (HIGHER, HIGHER, "reproduced"),
        (HIGHER, UNCLEAR, "in part"),
        (HIGHER, LOWER, "in part"),
        (LOWER, LOWER, "opposite"),
        (UNCLEAR, UNCLEAR, "inconclusive"),
        (UNCLEAR, LOWER, "inconclusive"),
    ],
)
def test_a_verdict_needs_every_metric(psnr, ssim, expected):
    rows = [row("regression", steps=None), row("sr3")]
    found = run(rows, (0, 1, "regression - sr3", {"psnr": psnr, "ssim": ssim}))
    assert verdict({"evaluation": found}, "distortion") == expected


def test_differences_are_shown_as_sr3_minus_regression():
    rows = [row("regression", steps=None), row("sr3")]
    frame = differences({"evaluation": run(rows, (0, 1, "regression - sr3", {"psnr": HIGHER}))})
    [line] = frame[frame["finding"] == "distortion"].to_dict("records")
    assert (line["low"], line["mean"], line["high"], line["method"]) == (-2.0, -1.0, -0.5, "sr3")


def test_only_default_samplers_decide():
    rows = [row("regression", steps=None), row("sr3", own=False), row("sr3", steps=9)]
    pairs = [(0, 1, "regression - sr3", {"lpips": LOWER}), (0, 2, "regression - sr3", {"lpips": HIGHER})]
    assert verdict({"evaluation": run(rows, *pairs)}, "perception") == "reproduced"


def test_all_rows_decide_where_none_has_a_default_sampler():
    rows = [row("sr3_l1", own=False), row("sr3", own=False)]
    found = run(rows, (0, 1, "l1 - l2", {"diversity": LOWER, "diversity_lpips": LOWER}))
    assert verdict({"diversity": found}, "diversity") == "reproduced"


def test_a_metric_that_one_row_lacks_decides_nothing():
    rows = [row("sr3_l1"), row("sr3"), row("sr3_l1", steps=9), row("sr3", steps=9)]
    pairs = [
        (0, 1, "l1 - l2", {"frechet_alexnet": LOWER, "kid_alexnet": LOWER}),
        (2, 3, "l1 - l2", {"frechet_alexnet": LOWER}),
    ]
    assert verdict({"evaluation": run(rows, *pairs)}, "norm") == "in part"


def test_the_l1_model_is_compared_only_with_l2():
    rows = [row("regression", steps=None), row("sr3"), row("sr3_l1")]
    pairs = [(0, 1, "regression - sr3", {"lpips": HIGHER}), (0, 2, "regression - sr3", {"lpips": LOWER})]
    assert verdict({"evaluation": run(rows, *pairs)}, "perception") == "reproduced"


def test_the_regression_does_not_decide_whether_sr3_is_recognized():
    rows = [row("bicubic", steps=None, own=False), row("sr3"), row("regression", steps=None)]
    pairs = [(1, 0, "model - bicubic", {"top1": HIGHER}), (2, 0, "model - bicubic", {"top1": LOWER})]
    assert verdict({"recognition": run(rows, *pairs)}, "recognition_bicubic_alexnet") == "reproduced"


def test_the_verdict_on_a_searched_schedule_uses_lpips_if_available():
    rows = [row("searched", detail="variance 0.5"), row("searched")]
    columns = {"lpips": LOWER, "frechet_alexnet": HIGHER}
    runs = {"searched": run(rows, (0, 1, "searched - default", columns))}
    assert verdict(runs, "searched") == "reproduced"
    runs = {"searched": run(rows, (0, 1, "searched - default", {"frechet_alexnet": HIGHER}))}
    assert verdict(runs, "searched") == "opposite"


def test_an_experiment_has_verdicts_only_on_what_it_measured():
    rows = [row("regression", steps=None), row("sr3")]
    runs = {"evaluation": run(rows, (0, 1, "regression - sr3", {"psnr": HIGHER, "ssim": HIGHER}))}
    assert verdicts(differences(runs)) == {"distortion": "reproduced"}
    assert verdicts(differences({})) == {}
    assert len({finding.key for finding in FINDINGS}) == len(FINDINGS)
