"""Collected results as pandas tables: one row per method and sampler, numbers formatted by the metric registry."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sr3_jax.errors import UserError
from sr3_jax.metrics import METRICS
from sr3_jax.sampling import count_steps

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DISTANCES = ("frechet_alexnet", "kid_alexnet", "frechet_classifier", "kid_classifier")
SAMPLER = ["method", "solver", "steps", "detail"]  # identifies a row of an evaluation


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): collect the results again") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): collect the results again") from error


def write_json(path: Path, value: Any) -> None:
    """Write plain values with floats rounded to 6 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(value), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def rows_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per row of an evaluation: the sampler, NFE, and 'METRIC', 'METRIC_low', 'METRIC_high' of each metric."""
    lines = []
    for row in rows:
        line = {key: row[key] for key in ("method", "scale", "solver", "steps", "nfe", "own")}
        line["detail"] = row.get("detail", "")
        for key, interval in row["summary"].items():
            line[key] = interval["mean"]
            line |= {f"{key}_{end}": interval[end] for end in ("low", "high") if end in interval}
        lines.append(line)
    frame = pd.DataFrame(lines)
    return frame.astype({"steps": "Int64", "nfe": "Int64"}).astype({"solver": object})


def number(key: str, value: float | None, *, signed: bool = False) -> str:
    """A value of a metric, formatted by the registry without negative zeros; '' if it was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = METRICS[key].format(value, signed=signed)
    return text.lstrip("+-") if float(text) == 0 else text


def present(frame: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The metrics that at least one row has, in the given order."""
    return [key for key in metrics if key in frame and frame[key].notna().any()]


def metrics_table(frame: pd.DataFrame, metrics: Sequence[str]) -> str:
    """Markdown table of means: method, sampler, NFE and the given metrics, without rows that have none of them."""
    frame = frame.dropna(how="all", subset=present(frame, metrics))
    shown = pd.DataFrame({"method": frame["method"]})
    shown["sampler"] = [sampler(row) for _, row in frame.iterrows()]
    shown["NFE"] = ["" if value == 0 else str(value) for value in frame["nfe"]]
    for key in present(frame, metrics):
        shown[METRICS[key].heading] = [number(key, value) for value in frame[key]]
    return markdown(shown)


_PROJECTED = "back_projection"


def sampler(row: Mapping[str, Any]) -> str:
    """'dpmpp_2m, 5 steps', with back-projection and the schedule's origin where they are not the default."""
    if pd.isna(row["solver"]):
        return ""
    projected = ", back-projection" if _PROJECTED in (row["detail"] or "") else ""
    return (
        f"{row['solver']}, {count_steps(row['steps'])}{projected}{', searched' * is_searched(row['detail'])}"
    )


def is_searched(detail: str | None) -> bool:
    """Whether the sampler of a row has settings that a schedule search finds; back-projection is none of them."""
    return any(not one.startswith(_PROJECTED) for one in (detail or "").split(", ") if one)


def markdown(frame: pd.DataFrame, *, left: int = 2) -> str:
    """A Markdown table of text cells: the first columns left-aligned, the others right-aligned."""
    align = ["left" if place < left else "right" for place in range(frame.shape[1])]
    text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text))  # without padding: shorter lines and diffs


def cascade_options(measured: Mapping[str, Any]) -> str:
    """The chosen guidance and augmentation strength as options of `sr3 cascade`."""
    return f"--guidance {measured['guidance']:g} --augment {measured['strength']:g}"
