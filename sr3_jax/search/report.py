"""What a schedule search found: a table, its JSON, and the choice that is stored beside the model.

Pure but for writing the files: a report is a mapping of plain values, as search.json holds it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.evaluation import tables
from sr3_jax.files import to_json, write_text
from sr3_jax.sampling import Sampling
from sr3_jax.search.scores import FRECHET, HIGHER, Judge, value_of

_HEADINGS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    FRECHET: "Frechet (AlexNet)",
    "consistency": "consist.",
}
_DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4, FRECHET: 3, "consistency": 2}


@dataclass(frozen=True)
class Outcome:
    """A race that is over: the sampling it found, judged on `images` crops; the model's default has found itself."""

    evaluations: int
    default: Sampling
    found: Sampling
    images: int


def rows_of(
    outcomes: Sequence[Outcome],
    *,
    search: Judge,
    check: Judge,
    count: int,
    own: Mapping[int, Sampling],
    metric: str,
) -> list[dict[str, Any]]:
    """Two rows a race, 'default' and 'best' (one where they are the same), with figures on both sets of crops.

    'own' are those of the model's default on the crops that the race was decided on.

    Args:
        count: crops of the check.
        own: the model's default at each number of evaluations.
    """
    rows = []
    for outcome in outcomes:
        both = {"default": outcome.default, "best": outcome.found}
        if outcome.found == outcome.default:
            del both["best"]
        for which, sampling in both.items():
            rows.append(
                {
                    "which": which,
                    "evaluations": outcome.evaluations,
                    "sampling": dataclasses.asdict(sampling),
                    "images": outcome.images,
                    "search": _figures(search, sampling, outcome.images),
                    "own": _figures(search, own[outcome.evaluations], outcome.images),
                    "check": to_json(check.figures(sampling, count)),
                    "gain": _gain(check, sampling, outcome.default, count, metric),
                    "over_own": _gain(check, sampling, own[outcome.evaluations], count, metric),
                }
            )
    return rows


def _figures(judge: Judge, sampling: Sampling, count: int) -> dict[str, float | None]:
    return to_json(judge.figures(sampling, count)) if count else {}


def _gain(
    judge: Judge, sampling: Sampling, default: Sampling, count: int, metric: str
) -> dict[str, Any] | None:
    """How much better than the default, with an interval over crops; None for figures of a whole set."""
    columns, usual = judge.columns(sampling, count), judge.columns(default, count)
    if metric not in columns or metric not in usual:
        return None
    difference = np.asarray(columns[metric]) - np.asarray(usual[metric])
    if not np.all(np.isfinite(difference)):
        return None
    return tables.bootstrap(difference if metric in HIGHER else -difference)


def choose(
    rows: Sequence[Mapping[str, Any]], *, own: Sampling, evaluations: int, metric: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The row to store, of those of `evaluations`, and that of the model's default; no row where that one stands.

    The choice is made on the crops of the search. It stands only if it is better on the others too, by more than
    chance where there is an interval.

    Args:
        own: the model's default at so many evaluations, which has its row.
    """
    sign = -1 if metric in HIGHER else 1
    rows = [row for row in rows if row["evaluations"] == evaluations]
    default = next((row for row in rows if row["sampling"] == dataclasses.asdict(own)), None)
    judged = [row for row in rows if row["search"] and row["check"]]
    if not judged:
        return None, default

    def over_default(row: Mapping[str, Any]) -> float:  # on the same crops, fewer where time was up
        usual = _value(row, "own", metric) if row["own"] else 0.0
        return sign * (_value(row, "search", metric) - usual)

    best = min(judged, key=lambda row: (over_default(row), row["which"] != "default"))
    if default is None or best is default:
        return None, default
    if default["check"] and sign * _value(best, "check", metric) >= sign * _value(default, "check", metric):
        return None, default
    if best["over_own"] is not None and best["over_own"]["low"] <= 0:
        return None, default
    return best, default


def _value(row: Mapping[str, Any], part: str, metric: str) -> float:
    value = value_of(row[part], metric)
    return np.inf if value is None else value


def provenance(
    report: Mapping[str, Any], best: Mapping[str, Any], default: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the file beside the model says of where its sampling is from."""
    names = (
        "metric",
        "data",
        "eval_data",
        "crop",
        "search_crops",
        "check_crops",
        "seed",
        "guarded",
        "version",
    )
    found = {name: report[name] for name in names}
    found |= {"score": value_of(best["check"], report["metric"]), "figures": best["check"]}
    if default is not None and default["check"]:
        found["default"] = {
            "sampling": default["sampling"],
            "score": value_of(default["check"], report["metric"]),
        }
    return found


def in_words(
    report: Mapping[str, Any], chosen: Mapping[str, Any] | None, default: Mapping[str, Any] | None
) -> str:
    """The choice as a sentence."""
    if chosen is None:
        return (
            "Nothing that was found beats the model's default on crops that were not searched by more than chance: "
            "the default stands."
        )
    metric = FRECHET if report["metric"] == "frechet" else report["metric"]
    name, sampling = _HEADINGS.get(metric, metric), Sampling(**chosen["sampling"])
    against = "none" if default is None else _figure(default["check"], metric)
    return (
        f"Chosen: {sampling.solver} in {sampling.steps} steps ({chosen['evaluations']} evaluations), {name} "
        f"{_figure(chosen['check'], metric)} where the model's default has {against}, on crops that were not searched."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page: how, the table, what was chosen."""
    metric = FRECHET if report["metric"] == "frechet" else report["metric"]
    shown = [name for name in _HEADINGS if any(name in row["check"] for row in report["rows"])]
    headings = ["solver", "evals", "steps", "which", "spacing", "log-SNR", "noise", "other"]
    headings += [f"{_HEADINGS.get(metric, metric)}, searched", *(_HEADINGS[name] for name in shown), "gain"]
    body = [_cells(row, metric, shown) for row in report["rows"]]
    where = report["eval_data"] or "the other images of the same data"
    lines = [
        f"# Schedule search: {report['model']}",
        "",
        f"By {_HEADINGS.get(metric, metric)} on {report['search_crops']} crops of {report['crop']} pixels of "
        f"{report['data']}, {report['tried']} samplings, seed {report['seed']}. The columns after the searched one "
        f"are of {report['check_crops']} crops of {where}, not seen by the search; gain: how much better than that "
        "solver's default there, with a 95% interval over the crops.",
        "",
        tables.table(headings, body),
        "",
        report["choice"],
        "",
    ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], metric: str, shown: Sequence[str]) -> list[str]:
    chosen = Sampling(**row["sampling"])
    ends = ["-" if end is None else f"{end:.1f}" for end in (chosen.log_snr_min, chosen.log_snr_max)]
    noise = {"ancestral": f"v={chosen.variance:g}", "ddim": f"eta={chosen.eta:g}"}.get(chosen.solver, "-")
    other = [f"{name}={getattr(chosen, name):g}" for name in ("guidance", "augment")]
    usual = [f"{name}={getattr(Sampling(), name):g}" for name in ("guidance", "augment")]
    gain = row["gain"]
    return [
        chosen.solver,
        str(row["evaluations"]),
        str(chosen.steps),
        row["which"],
        chosen.spacing or "own",
        "-" if ends == ["-", "-"] else f"{ends[0]} to {ends[1]}",
        noise,
        ", ".join(one for one in other if one not in usual) or "-",
        *(
            _figure(row[part], name)
            for part, name in [("search", metric), *(("check", name) for name in shown)]
        ),
        f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f})"
        if gain and row["which"] == "best"
        else "-",
    ]


def _figure(figures: Mapping[str, Any], name: str) -> str:
    return tables.figure(figures[name], _DIGITS.get(name, 3)) if name in figures else "-"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """search.json and search.md."""
    write_text(folder / "search.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "search.md", markdown(report))
