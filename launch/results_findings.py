"""Whether the paper's findings appear in collected results: judged by intervals of paired differences, in words.

Pure: results are plain values as docs/results/NAME.json holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sr3_jax.metrics import METRICS

APPEARED, PART, OPPOSITE, OPEN = "appeared", "in part", "the opposite", "not decided"
HEADINGS = {key: metric.heading for key, metric in METRICS.items()}


DISTANCES = ("frechet_alexnet", "kid_alexnet", "frechet_classifier", "kid_classifier")


@dataclass(frozen=True)
class Line:
    """One comparison: what is subtracted from what, with {column: difference}, and whether it decides."""

    title: str
    cells: Mapping[str, Mapping[str, float]]
    decides: bool


@dataclass(frozen=True)
class Finding:
    """A finding of the paper in one experiment.

    Attributes:
        key: its name, under which notes.json has the explanation.
        title: what the paper found.
        wanted: {column: +1 or -1}, the sign that the differences must have.
        lines: the comparisons.
    """

    key: str
    title: str
    wanted: Mapping[str, int]
    lines: Sequence[Line]

    @property
    def verdict(self) -> str:
        """Of the lines that decide."""
        keys = [key for key in self.wanted if any(key in line.cells for line in self.lines)]
        signs = [
            sign(line.cells[key]) * self.wanted[key]
            if key in line.cells
            else 0  # what is missing decides nothing
            for line in self.lines
            if line.decides
            for key in keys
        ]
        return _verdict(signs)

    @property
    def sentence(self) -> str:
        """The verdict with what it rests on."""
        count = sum(_all_wanted(line.cells, self.wanted) for line in self.lines)
        text = f"**{self.verdict[:1].upper()}{self.verdict[1:]}**"
        parts = []
        if self.verdict in (PART, OPEN):
            for key, want in self.wanted.items():
                of = [
                    sign(line.cells[key]) * want for line in self.lines if line.decides and key in line.cells
                ]
                if of:
                    parts.append(f"{HEADINGS[key]}: {_verdict(of)}")
        text += f" ({'; '.join(parts)})" if parts else ""
        return f"{text}; it holds in whole in {count} of the {len(self.lines)} comparisons."


def sign(cell: Mapping[str, float]) -> int:
    """1 or -1 where the interval leaves out 0, else 0."""
    return 1 if cell["low"] > 0 else -1 if cell["high"] < 0 else 0


def _verdict(signs: Sequence[int]) -> str:
    if not signs:
        return OPEN
    if all(one > 0 for one in signs):
        return APPEARED
    if all(one < 0 for one in signs):
        return OPPOSITE
    return PART if any(one > 0 for one in signs) else OPEN


def _all_wanted(cells: Mapping[str, Mapping[str, float]], wanted: Mapping[str, int]) -> bool:
    present = [sign(cells[key]) * want > 0 for key, want in wanted.items() if key in cells]
    return bool(present) and all(present)


def findings(run: Mapping[str, Any]) -> list[Finding]:
    """Those of one evaluation that its rows can show."""
    found = []
    against = _lines(run, "regression - diffusion", of="regression")
    if against:
        found.append(
            Finding(
                "distortion",
                "The regression is above SR3 in PSNR and SSIM (differences: regression - SR3; above 0 as in the paper)",
                {"psnr": 1, "ssim": 1},
                against,
            )
        )
        found.append(
            Finding(
                "perception",
                "SR3 is better than the regression in the feature distance and LPIPS "
                "(differences: regression - SR3; above 0 as in the paper)",
                {"lpips": 1, **dict.fromkeys(DISTANCES, 1)},
                against,
            )
        )
    beside_bicubic = _lines(run, "model - bicubic", of="bicubic")
    if beside_bicubic:
        found.append(
            Finding(
                "consistency",
                "Both SR3 and the regression agree with the low-res image (here: closer than bicubic; "
                "differences: model - bicubic; below 0 as in the paper)",
                {"consistency": -1},
                beside_bicubic,
            )
        )
    if any("top1" in line.cells for line in against):
        claim = (
            "A classifier recognises SR3's outputs better than {} (differences of top-1 %: SR3 - {}; above 0 as in "
            "the paper)"
        )
        beside = [Line(line.title, {"top1": _turned(line.cells["top1"])}, line.decides) for line in against]
        found.append(
            Finding("recognition", claim.format("the regression's", "regression"), {"top1": 1}, beside)
        )
        others = [line for line in beside_bicubic if not line.title.startswith("regression")]
        found.append(
            Finding("recognition_bicubic", claim.format("bicubic's", "bicubic"), {"top1": 1}, others)
        )
    norms = _lines(run, "L1 - L2", of="")
    if norms:
        found.append(
            Finding(
                "norm",
                "L1 gives a slightly better feature distance than L2 (differences: L1 - L2; below 0 as in the paper)",
                {key: -1 for key in DISTANCES if any(key in line.cells for line in norms)},
                norms,
            )
        )
        diverse = {
            key: -1 for key in ("diversity", "diversity_lpips") if any(key in line.cells for line in norms)
        }
        if diverse:
            title = "L1 gives less diverse outputs than L2 (differences: L1 - L2; below 0 as in later work)"
            found.append(Finding("diversity", title, diverse, norms))
    return found


def searched_finding(run: Mapping[str, Any]) -> Finding | None:
    """What a stored search is worth on the images that everything else is judged on."""
    lines = [
        Line(title_of(run["rows"][pair["a"]]), pair["columns"], True)
        for pair in run["pairs"]
        if pair["kind"] == "searched - usual"
    ]
    title = (
        "The schedule found by search, on the images of the tables above (differences: searched - usual; below 0 as "
        "in the paper)"
    )
    present = [key for key in ("lpips", *DISTANCES) if any(key in line.cells for line in lines)]
    columns = dict.fromkeys(["lpips"] if "lpips" in present else present, -1)
    return Finding("searched", title, columns, lines) if lines and columns else None


def search_finding(searches: Sequence[Mapping[str, Any]]) -> Finding | None:
    """Of schedule searches by one metric: what each gains for a solver on images that were not searched."""
    metric = searches[0]["metric"] if searches else ""
    lines = [
        Line(
            f"{row['sampling']['solver']}, NFE {row['nfe']}",
            {metric: row["gain"]},
            row["sampling"]["solver"] == "ancestral",
        )
        for search in searches
        for row in search["rows"]
        if row["which"] == "best" and row["gain"]
    ]
    title = (
        f"A schedule found by search is better than the usual one (gains in {HEADINGS.get(metric, metric)} on "
        "images that were not searched; above 0 as in the paper, whose sampler is the ancestral one)"
    )
    return Finding("search", title, {metric: 1}, lines) if lines else None


def _lines(run: Mapping[str, Any], kind: str, *, of: str) -> list[Line]:
    lines = []
    for pair in run["pairs"]:
        a, b = run["rows"][pair["a"]], run["rows"][pair["b"]]
        if pair["kind"] != kind:
            continue
        shown = b if of == "regression" else a
        decides = shown["own"] and (shown["method"] != "sr3_l1" or kind == "L1 - L2")
        lines.append(Line(title_of(shown), pair["columns"], decides))
    if kind == "L1 - L2" and lines and not any(line.decides for line in lines):
        lines = [Line(line.title, line.cells, True) for line in lines]
    return lines


def title_of(row: Mapping[str, Any]) -> str:
    """A row in words."""
    if not row["solver"]:
        return row["method"]
    detail = " (searched)" if row.get("detail") else ""
    return f"{row['method']} {row['solver']} {row['steps']}{detail}"


def _turned(cell: Mapping[str, float]) -> dict[str, Any]:
    return {"mean": 0.0 - cell["mean"], "low": 0.0 - cell["high"], "high": 0.0 - cell["low"]}


def cell(key: str, of: Mapping[str, float] | None) -> str:
    """A difference with its interval."""
    if of is None:
        return ""
    mean, low, high = (METRICS[key].format(of[end], signed=True) for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
