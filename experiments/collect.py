"""Collects the evaluations of an experiment into docs/: the inputs of `python -m experiments.pages`.

    python -m experiments.collect results photos OUT      # docs/results/photos.json and its image grids
    python -m experiments.collect model photo_4x --set "Bundled test photographs" out/photos --set Set14 out/set14
    python -m experiments.collect stamp WORKDIR           # record commit and hardware next to a training run
    python -m experiments.collect store SEARCH_JSON MODEL # store a searched schedule next to a model

experiments/run.sh calls all but the second. Single images are left out; paired differences between methods are
computed here, over the same images. Where images come in groups (tiles of one photograph, images of one person),
whole groups are resampled.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments import resample
from experiments.tables import DOCS, ROOT, is_searched, read_json, write_json
from sr3_jax.distributed.processes import hardware
from sr3_jax.errors import UserError
from sr3_jax.evaluation.results import LEVEL, RESAMPLES
from sr3_jax.evaluation.runner import select_images
from sr3_jax.files import unique_file_name, write_text
from sr3_jax.inference.loading import load
from sr3_jax.inference.sampling_file import sampling_path, store_sampling
from sr3_jax.sampling import Sampling

FORMAT = "sr3_jax.results.2"
STAMP = "made.json"
RUNS = ("evaluation", "patches", "recognition", "diversity", "searched", "sweep")
MODELS = ("sr3", "regression", "sr3_l1")
SEARCHES = ("search", "search_ancestral")
PAIRED = ("psnr", "ssim", "consistency", "lpips", "top1", "diversity", "diversity_lpips")
NORMAL = 1.96  # standard deviations on each side of 95% of a normal distribution
IMAGES_PER_PERSON = 5  # consecutive images of one person in the probe split of the ORL faces
MAX_BYTES = 600_000  # of an image in docs/images


def catalog() -> dict[str, dict[str, Any]]:
    """The experiments of experiments.toml: {key: title, description, result, prefix, notes}."""
    text = (ROOT / "experiments" / "experiments.toml").read_text(encoding="utf-8")
    return {key: {"prefix": "", **entry} for key, entry in tomllib.loads(text).items()}


def collect_results(name: str, out: Path, docs: Path, *, credits: Path | None = None) -> Path:
    """Write docs/results/NAME.json and the image grids from an experiment's folder; returns the JSON's path.

    Runs that have not finished are left out.

    Args:
        credits: a CSV file with the columns file, author, license (or licence) and package of the photographs.

    Raises:
        UserError: the folder has no evaluation.
    """
    entries = [entry for entry in catalog().values() if entry["result"] == name]
    prefixes = [entry["prefix"] for entry in entries]
    runs = {
        prefix + run: compact(name, out / prefix / run)
        for prefix in prefixes
        for run in RUNS
        if (out / prefix / run / "evaluation.json").is_file()
    }
    if not runs:
        raise UserError(f"{out} has no evaluation of {name}: run experiments/run.sh {name} {out}")
    commands = dry_run(name, out)
    trained = [prefix + model for prefix in prefixes for model in MODELS]
    searches = [prefix + search for prefix in prefixes for search in SEARCHES]
    result = {
        "format": FORMAT,
        "name": name,
        "date": _now(),
        "commit": commit(),
        "training": {
            model: training(out / model) | {"command": _command_of(commands, out / model)}
            for model in trained
            if (out / model / "config.json").is_file() and _evaluated(model, runs)
        },
        "runs": runs,
        "searches": {
            search: read_json(out / search / "search.json")
            for search in searches
            if (out / search / "search.json").is_file()
        },
        "credits": image_credits(out / prefixes[0] / RUNS[0], credits) if credits else [],
    }
    for key, entry in catalog().items():
        grid = out / entry["prefix"] / RUNS[0] / "grid.png"
        if entry["result"] == name and grid.is_file():
            copy_image(grid, docs / "images" / f"results_{key}")
    write_json(docs / "results" / f"{name}.json", result)
    return docs / "results" / f"{name}.json"


def dry_run(name: str, out: Path) -> list[str]:
    """The commands that experiments/run.sh runs for an experiment."""
    command = ["bash", str(ROOT / "experiments" / "run.sh"), "--dry-run", name, str(out)]
    command += ["PHOTOS"] if name == "photos" else []
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _command_of(commands: Sequence[str], workdir: Path) -> str:
    return next((line for line in commands if f"--workdir={workdir}" in line.split()), "")


def _evaluated(model: str, runs: Mapping[str, Any]) -> bool:
    """Whether a finished training run was evaluated (another may still be in progress)."""
    prefix, label = model.rpartition("/")[0], model.rpartition("/")[2]
    return any(
        run.rpartition("/")[0] == prefix and label in (one["label"] for one in found["models"])
        for run, found in runs.items()
    )


def compact(name: str, folder: Path) -> dict[str, Any]:
    """An evaluation without its single images and times, with the paired differences between its rows."""
    found = read_json(folder / "evaluation.json")
    group_of = groups(name, [image["name"] for image in found["images"]])
    rows = found["rows"]
    resamples = resample.set_metrics(folder, found, rows, group_of)
    pairs = []
    for a, b, contrast in contrasts(rows):
        columns = differences(rows[a], rows[b], group_of)
        for key in (key for key in resamples[a] if key in resamples[b]):
            mean = rows[a]["summary"][key]["mean"] - rows[b]["summary"][key]["mean"]
            half = NORMAL * float(np.std(np.subtract(resamples[a][key], resamples[b][key]), ddof=1))
            columns[key] = {"mean": mean, "low": mean - half, "high": mean + half}
        pairs.append({"contrast": contrast, "a": a, "b": b, "columns": columns})
    kept = ("command", "seconds", "outputs_reused", "date", "hardware", "versions")
    protocol = {key: value for key, value in found["protocol"].items() if key != "sentences"}
    return {
        **{key: found[key] for key in kept},
        "protocol": protocol,
        "groups": len(np.unique(group_of)),
        "models": [{key: value for key, value in one.items() if key != "config"} for one in found["models"]],
        "rows": [summarized(row) for row in rows],
        "pairs": pairs,
    }


def summarized(row: Mapping[str, Any], *, keep_time: bool = False) -> dict[str, Any]:
    """A row without its images, and without the time, which holds only for an otherwise idle machine."""
    kept = ("method", "scale", "solver", "steps", "detail", "nfe", "own")
    dropped = () if keep_time else ("seconds",)
    summary = {key: value for key, value in row["summary"].items() if key not in dropped}
    return {key: row.get(key) for key in kept} | {"summary": summary}


def contrasts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """The pairs (a, b, contrast) of rows whose difference a - b bears on a finding of the paper."""
    pairs = []
    for a, one in enumerate(rows):
        for b, other in enumerate(rows):
            if one["scale"] != other["scale"] or a == b:
                continue
            same_sampler = all(one[key] == other[key] for key in ("solver", "steps"))
            details = one.get("detail"), other.get("detail")
            searched = [is_searched(detail) for detail in details]
            if one["method"] == "regression" and other["solver"]:
                pairs.append((a, b, "regression - sr3"))
            elif other["method"] == "bicubic" and one["nfe"]:
                pairs.append((a, b, "model - bicubic"))
            elif one["method"] == "sr3_l1" and other["method"] == "sr3" and same_sampler:
                if details[0] == details[1]:
                    pairs.append((a, b, "l1 - l2"))
            elif one["method"] == other["method"] and same_sampler and searched[0] and not searched[1]:
                pairs.append((a, b, "searched - default"))
    return pairs


def differences(a: Mapping[str, Any], b: Mapping[str, Any], group_of: np.ndarray) -> dict[str, Any]:
    """{metric: paired difference a - b} of the metrics that both rows have, finite, for every image."""
    found: dict[str, Any] = {}
    names = list(a["images"])
    for key in PAIRED:
        values = [[row["images"][name].get(key) for name in names] for row in (a, b)]
        if any(one is None or None in one for row in values for one in row):
            continue
        x, y = (np.array([np.mean(one) for one in row]) for row in values)
        found[key] = paired(x - y, group_of)
    return found


def paired(difference: np.ndarray, group_of: np.ndarray) -> dict[str, float]:
    """{'mean', 'low', 'high', 'share'} of differences [N] by a bootstrap over the groups `group_of` [N].

    'share' is the share of images with a difference above 0.
    """
    count = group_of.max() + 1
    sums = np.bincount(group_of, weights=difference, minlength=count)
    sizes = np.bincount(group_of, minlength=count).astype(np.float64)
    chosen = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    means = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    share = float((difference > 0).mean())
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high), "share": share}


def groups(name: str, images: Sequence[str]) -> np.ndarray:
    """[N] the index of the group of each image: its photograph, its person, or itself."""
    if name == "photos":
        return np.unique([re.sub(r"-\d+$", "", image) for image in images], return_inverse=True)[1]
    index = np.arange(len(images))
    return index // IMAGES_PER_PERSON if name == "orl" else index


def training(workdir: Path) -> dict[str, Any]:
    """Steps, seconds and held-out PSNR of a training run, from its log."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    tested = [line for line in lines if "eval_psnr" in line]
    before, seconds = 0, 0.0
    for line in (line for line in lines if "step_ms" in line):
        seconds += (line["step"] - before) * line["step_ms"] / 1000
        before = line["step"]
    config = read_json(workdir / "config.json")
    peak = max(tested, key=lambda line: line["eval_psnr"], default=None)
    return {
        "steps": lines[-1]["step"] if lines else 0,
        "batch": config["train"]["batch_size"],
        "seconds": round(seconds),
        "regression": config["model"]["regression"],
        "norm": config["diffusion"]["norm"],
        "seed": config["train"]["seed"],
        "peak": {"step": peak["step"], "psnr": peak["eval_psnr"]} if peak else None,
        "psnr": tested[-1]["eval_psnr"] if tested else None,
        **(read_json(workdir / STAMP) if (workdir / STAMP).is_file() else {}),
    }


def stamp(workdir: Path) -> None:
    """Record commit, hardware and date next to a training run, unless it was started before."""
    if not (workdir / STAMP).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        made = {"commit": commit(), "hardware": hardware(), "date": _now()}
        write_text(workdir / STAMP, json.dumps(made) + "\n")


def commit() -> str:
    """The commit of the checkout, '' outside a git repository."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def store_schedule(search: Path, model: Path) -> None:
    """Store the best sampling of a search next to a model, even where it does not beat the default.

    `sr3 search-schedule` itself stores only a sampling that does; an experiment compares both on other images.
    """
    best = next((row for row in read_json(search)["rows"] if row["which"] == "best"), None)
    if best is None:
        return  # the search found nothing better than the starting point
    loaded = load(model)
    store_sampling(
        sampling_path(model),
        Sampling(**best["sampling"]),
        params=loaded.params,
        config=loaded.config,
        name=loaded.name,
        found={"search": str(search)},
    )


def collect_model(name: str, sets: Mapping[str, Path], docs: Path) -> Path:
    """Write docs/models/NAME_evaluations.json from evaluation folders, and the grids of the first set.

    Only the first set's images are copied: others, such as Set14's, may not be redistributed.

    Args:
        sets: {title: folder of `sr3 evaluate`}.
    """
    evaluations = {}
    for title, folder in sets.items():
        found = read_json(folder / "evaluation.json")
        kept = ("command", "date", "hardware", "versions", "models")
        rows = [summarized(row, keep_time=True) for row in found["rows"]]
        evaluations[title] = {key: found[key] for key in kept} | {
            "images": found["protocol"]["images"],
            "rows": rows,
        }
        for model in evaluations[title]["models"]:
            model.pop("config", None)
    title, first = next(iter(sets.items()))
    stem = re.sub(r"\W+", "_", f"{name} {title}").lower()
    for suffix in ("", "_samplers"):
        grids = [first / "grid.png"] if not suffix else sorted(first.glob("grid_*.png"))[:1]
        for grid in grids:
            copy_image(grid, docs / "images" / f"{stem}{suffix}")
    write_json(docs / "models" / f"{name}_evaluations.json", evaluations)
    return docs / "models" / f"{name}_evaluations.json"


def image_credits(folder: Path, credits: Path) -> list[str]:
    """Author and license of each photograph that an evaluation's grid shows, one line each."""
    found = read_json(folder / "evaluation.json")
    rows = [row for row in found["rows"] if row["method"] == found["models"][0]["label"]]
    row = max(rows, key=lambda row: (row["own"], row["steps"] or 0))  # the row that selected the images
    names = list(row["images"])
    psnr = np.array([np.mean(row["images"][name]["psnr"]) for name in names])
    with credits.open(encoding="utf-8", newline="") as file:
        known = {unique_file_name(Path(line["file"]).stem, set()): line for line in csv.DictReader(file)}
    shown = [known.get(re.sub(r"-\d+$", "", names[place])) for place in select_images(psnr).values()]
    lines = [
        f"{one['file']}: {one['author']}, {one.get('license') or one['licence']}, from {one['package']}"
        for one in shown
        if one
    ]
    return list(dict.fromkeys(lines))


def copy_image(source: Path, stem: Path) -> Path:
    """Copy an image as STEM.png, or as the best STEM.jpg of at most MAX_BYTES; small images are shown 2x larger."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for old in stem.parent.glob(f"{stem.name}.*"):
        old.unlink()
    with Image.open(source) as opened:
        image = opened.convert("RGB")
    if image.width < 500:
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    data, suffix, quality = io.BytesIO(), ".png", 95
    image.save(data, "PNG", optimize=True)
    while data.tell() > MAX_BYTES and quality > 20:
        data, suffix = io.BytesIO(), ".jpg"
        image.save(data, "JPEG", quality=quality, subsampling=0)
        quality -= 5
    target = stem.with_suffix(suffix)
    target.write_bytes(data.getvalue())
    return target


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    results = actions.add_parser("results", help="an experiment of experiments/run.sh")
    results.add_argument("name", choices=sorted({entry["result"] for entry in catalog().values()}))
    results.add_argument("out", type=Path)
    results.add_argument("--credits", type=Path, metavar="CSV", help="authors of the photographs")
    model = actions.add_parser("model", help="evaluations of a shipped model")
    model.add_argument("name")
    model.add_argument("--set", nargs=2, action="append", required=True, metavar=("TITLE", "FOLDER"))
    for action in (results, model):
        action.add_argument("--docs", type=Path, default=DOCS, help="default: %(default)s")
    actions.add_parser("stamp").add_argument("workdir", type=Path)
    searched = actions.add_parser("store")
    searched.add_argument("search", type=Path)
    searched.add_argument("model", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.action == "results":
            print(collect_results(args.name, args.out, args.docs, credits=args.credits))
        elif args.action == "model":
            print(collect_model(args.name, {title: Path(folder) for title, folder in args.set}, args.docs))
        elif args.action == "stamp":
            stamp(args.workdir)
        else:
            store_schedule(args.search, args.model)
    except UserError as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
