"""The figures of docs/results.md from the folders of an experiment, as plain values without the single images.

Differences between two methods are over the same images, which is much sharper than two intervals side by side. Where
images come in groups (tiles of one photograph, images of one person) whole groups are generate_jit again, not images.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import results_draws

from sr3_jax.errors import UserError
from sr3_jax.evaluation import grids
from sr3_jax.evaluation.results import hardware
from sr3_jax.evaluation.tables import LEVEL, RESAMPLES
from sr3_jax.files import unique_file_name
from sr3_jax.inference.model import load
from sr3_jax.inference.sampling_file import (
    StoredSampling,
    config_fingerprint,
    params_fingerprint,
    sampling_path,
    write_sampling,
)
from sr3_jax.sampling import Sampling

ROOT = Path(__file__).resolve().parent.parent
FORMAT = "sr3_jax.results.1"
STAMP = "made.json"
NORMAL = 1.96  # standard deviations on each side of 95% of a normal distribution
RUNS: Mapping[str, Sequence[str]] = {  # the folders of evaluations, the main one first
    "photos": ("evaluation", "patches", "recognition", "diversity", "searched", "sweep"),
    "fashion": ("evaluation", "diversity", "searched", "sweep"),
    "orl": (
        *("8x/evaluation", "8x/recognition", "8x/searched", "8x/sweep"),
        *("4x/evaluation", "4x/recognition"),
    ),
}
TRAINED: Mapping[str, Sequence[str]] = {
    "photos": ("sr3", "regression", "sr3_l1"),
    "fashion": ("sr3", "regression", "sr3_l1"),
    "orl": ("8x/sr3", "8x/regression", "4x/sr3", "4x/regression"),
}
SEARCHES = ("search", "search_ancestral", "8x/search_ancestral")
PEOPLE = 5  # images in a row of one person, in the probe of the ORL faces
PAIRED = ("psnr", "ssim", "consistency", "lpips", "top1", "diversity", "diversity_lpips")


def stamp(workdir: Path) -> None:
    """Note beside a training by what code, where and when it was begun, unless that is noted."""
    if (workdir / STAMP).exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    made = {"commit": commit(), "hardware": hardware(), "date": _now()}
    (workdir / STAMP).write_text(json.dumps(made) + "\n", encoding="utf-8")


def commit() -> str:
    """The checkout's commit, '' where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def collect(name: str, out: Path, *, commands: Sequence[str], credits: Path | None = None) -> dict[str, Any]:
    """Everything that docs/results/NAME.json holds; what is not there yet is left out.

    Args:
        commands: what was run.
        credits: a CSV file of who made the photographs.

    Raises:
        UserError: there is no evaluation.
    """
    runs = {}
    for run in RUNS[name]:
        if (out / run / "evaluation.json").is_file():
            runs[run] = compact(name, out / run)
    if not runs:
        raise UserError(f"{out} has no evaluation of {name}: run launch/experiment.sh {name} {out}")
    searches = [out / folder / "search.json" for folder in SEARCHES]
    return {
        "format": FORMAT,
        "name": name,
        "date": _now(),
        "commit": commit(),
        "commands": list(commands),
        "training": {
            one: training(out / one)
            for one in TRAINED[name]
            if (out / one / "config.json").is_file() and _evaluated(one, runs)
        },
        "runs": runs,
        "searches": [read(file) for file in searches if file.is_file()],
        "credits": credited(out / RUNS[name][0], credits) if credits else [],
    }


def _evaluated(trained: str, runs: Mapping[str, Any]) -> bool:
    """Whether a training is one of what was evaluated, rather than one that still goes on."""
    folder, _, label = trained.rpartition("/")
    return any(
        run.rpartition("/")[0] == folder and label in (model["label"] for model in found["models"])
        for run, found in runs.items()
    )


def credited(folder: Path, credits: Path) -> list[str]:
    """Whom the photographs that an evaluation's grid shows are by, one line each."""
    found = read(folder / "evaluation.json")
    first = found["models"][0]
    rows = [row for row in found["rows"] if row["method"] == first["label"]]
    # As `evaluation.grids.representative` has it: the model's own sampler, else the one with the most steps.
    row = max(rows, key=lambda row: (row["own"], row["steps"] or 0))
    names = list(row["images"])
    psnr = np.array([np.mean(row["images"][name]["psnr"]) for name in names])
    with credits.open(encoding="utf-8", newline="") as file:
        known = {unique_file_name(Path(line["file"]).stem, set()): line for line in csv.DictReader(file)}
    lines = []
    for place in grids.select_images(psnr).values():
        line = known.get(re.sub(r"-\d+$", "", names[place]))
        if line is not None:
            lines.append(f"{line['file']}: {line['author']}, {line['licence']}, from {line['package']}")
    return list(dict.fromkeys(lines))


def read(path: Path) -> Any:
    """A JSON file. UserError if it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): run launch/experiment.sh again"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): run launch/experiment.sh again") from error


def training(workdir: Path) -> dict[str, Any]:
    """What the logs of a training say: steps, seconds, the last and the best held-out figures."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step_ms" in line]
    tested = [line for line in lines if "eval_psnr" in line]
    before, seconds = 0, 0.0
    for line in timed:
        seconds += (line["step"] - before) * line["step_ms"] / 1000
        before = line["step"]
    config = read(workdir / "config.json")
    peak = max(tested, key=lambda line: line["eval_psnr"], default=None)
    made = read(workdir / STAMP) if (workdir / STAMP).is_file() else {}
    return {
        "steps": lines[-1]["step"] if lines else 0,
        "batch": config["train"]["batch_size"],
        "seconds": round(seconds),
        "regression": config["model"]["regression"],
        "norm": config["diffusion"]["norm"],
        "seed": config["train"]["seed"],
        "peak": {"step": peak["step"], "psnr": peak["eval_psnr"]} if peak else None,
        "psnr": tested[-1]["eval_psnr"] if tested else None,
        **made,
    }


def store_found(search: Path, model: Path) -> None:
    """Store the sampling that a search found beside a model, whether or not the search itself did.

    For the figures with and without it on other images; `sr3 search-schedule` stores only what beats the default.
    """
    found = read(search)
    row = next((row for row in found["rows"] if row["which"] == "best"), None)
    if row is None:
        return  # it found what was there
    loaded = load(model)
    source = {"search": str(search)}
    write_sampling(
        sampling_path(model),
        StoredSampling(
            Sampling(**row["sampling"]),
            params_fingerprint(loaded.params),
            config_fingerprint(loaded.config),
            loaded.name,
            source,
        ),
    )


def groups(name: str, images: Sequence[str]) -> np.ndarray:
    """[N] the number of the group that each image belongs to."""
    if name == "photos":
        keys = [re.sub(r"-\d+$", "", image) for image in images]
        return np.unique(keys, return_inverse=True)[1]
    count = np.arange(len(images))
    return count // PEOPLE if name == "orl" else count


def compact(name: str, folder: Path) -> dict[str, Any]:
    """An evaluation without its images, with the differences between its rows."""
    found = read(folder / "evaluation.json")
    of = groups(name, [image["name"] for image in found["images"]])
    rows = found["rows"]
    draws = results_draws.set_draws(folder, found, of)
    pairs = []
    for a, b, kind in interesting(rows):
        columns = differences(rows[a], rows[b], of)
        for key in (key for key in draws[a] if key in draws[b]):
            middle = rows[a]["summary"][key]["mean"] - rows[b]["summary"][key]["mean"]
            half = NORMAL * float(np.std(np.subtract(draws[a][key], draws[b][key]), ddof=1))
            columns[key] = {"mean": middle, "low": middle - half, "high": middle + half}
        pairs.append({"kind": kind, "a": a, "b": b, "columns": columns})
    kept = ("command", "seconds", "outputs_reused", "date", "hardware", "versions", "protocol")
    return {
        **{key: found[key] for key in kept},
        "groups": len(np.unique(of)),
        "models": [{key: of for key, of in model.items() if key != "config"} for model in found["models"]],
        "rows": [_without_images(row) for row in rows],
        "pairs": pairs,
    }


def _without_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """Nor the time, which is worth something only of a machine that does nothing else."""
    kept = {key: of for key, of in row.items() if key != "images"}
    return {**kept, "summary": {key: of for key, of in row["summary"].items() if key != "seconds"}}


def interesting(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """Pairs (a, b, kind) of rows whose difference a - b is a finding of the paper."""
    pairs = []
    for a, one in enumerate(rows):
        for b, other in enumerate(rows):
            if one["scale"] != other["scale"] or a == b:
                continue
            same = all(one[key] == other[key] for key in ("solver", "steps"))
            if one["method"] == "regression" and other["solver"]:
                pairs.append((a, b, "regression - diffusion"))
            elif other["method"] == "bicubic" and one["nfe"]:
                pairs.append((a, b, "model - bicubic"))
            elif one["method"] == "sr3_l1" and other["method"] == "sr3" and same:
                if one.get("detail") == other.get("detail"):
                    pairs.append((a, b, "L1 - L2"))
            elif one["method"] == other["method"] and same and one.get("detail") and not other.get("detail"):
                pairs.append((a, b, "searched - usual"))
    return pairs


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], of: np.ndarray
) -> dict[str, dict[str, float | None]]:
    """{column: mean difference a - b over the same images, with its interval} where both have finite scores."""
    found: dict[str, dict[str, float | None]] = {}
    names = list(a["images"])
    for key in PAIRED:
        values = [[row["images"][name].get(key) for name in names] for row in (a, b)]
        if any(one is None or None in one for row in values for one in row):
            continue
        x, y = (np.array([np.mean(one) for one in row]) for row in values)
        found[key] = paired(x - y, of)
    return found


def paired(difference: np.ndarray, of: np.ndarray) -> dict[str, float | None]:
    """{'mean', 'low', 'high', 'share'} of differences [N]: percentiles of resamples of the groups `of` [N].

    'share' is that of the images where the difference is above 0.
    """
    count = of.max() + 1
    sums = np.bincount(of, weights=difference, minlength=count)
    sizes = np.bincount(of, minlength=count).astype(np.float64)
    draw = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    means = sums[draw].sum(axis=1) / sizes[draw].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    share = float((difference > 0).mean())
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high), "share": share}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
