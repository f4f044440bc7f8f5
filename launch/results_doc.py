#!/usr/bin/env python
"""Writes docs/results.md and its pictures from docs/results/*.json; nothing on that page is typed by hand.

    python launch/results_doc.py                        # the page, from what was collected
    python launch/results_doc.py --collect photos OUT   # first collect an experiment's figures from its folder
    python launch/results_doc.py --stamp WORKDIR        # note the commit and the machine beside a training
    python launch/results_doc.py --store SEARCH_JSON MODEL   # what a search found, beside a model

launch/experiment.sh does all of it. notes.json beside the collected figures explains findings: {experiment: {finding:
sentences}}; paper.json has the paper's own tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results_curve
import results_figures
from PIL import Image
from results_findings import (
    DIGITS,
    DISTANCES,
    HEADINGS,
    Finding,
    cell,
    findings,
    search_finding,
    searched_finding,
    sign,
    title_of,
)

from sr3_jax import search_report, tables
from sr3_jax.aliases import UserError
from sr3_jax.outputs import write_text

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 400_000  # bytes of a picture
TITLES = {
    "photos": "Photographs at 4x",
    "fashion": "Fashion-MNIST at 4x, 7x7 to 28x28",
    "orl": "The ORL faces",
}
KEYS = {
    "distortion": "regression above SR3 in PSNR, SSIM",
    "perception": "SR3 better in feature distance, LPIPS",
    "consistency": "both agree with the low-res",
    "recognition": "classifier better on SR3's outputs than on the regression's",
    "recognition_bicubic": "classifier better on SR3's outputs than on bicubic's",
    "norm": "L1 better than L2 in feature distance",
    "diversity": "L1 less diverse than L2",
    "search": "schedule search helps",
}
SIDE = ("patches", "diversity", "searched", "sweep")  # runs that answer one question each
CURVES = ("lpips", "psnr")


def sections(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], list[Finding]]]:
    """(title, evaluation, findings) of each evaluation that findings are judged on: of another kind of run they join
    the first one's."""
    name = result["name"]
    parts: list[tuple[str, Mapping[str, Any], list[Finding]]] = []
    for run, found in result["runs"].items():
        if run == "sweep":
            continue
        if run == "diversity":  # its other columns are of fewer pictures
            parts[0][2].extend(one for one in findings(found) if one.key == "diversity")
            continue
        if run == "patches":
            extra = [one for one in findings(found) if one.key == "perception"]
            for one in extra:
                wanted = {key: want for key, want in one.wanted.items() if key in DISTANCES}
                side = found["protocol"]["features"]["patch"]
                title = f"The same in the features of patches of {side}x{side} pixels (regression - SR3)"
                parts[0][2].append(Finding("patches", title, wanted, one.lines))
            continue
        if run == "searched":
            parts[0][2].extend(one for one in [searched_finding(found)] if one)
            for one in findings(found):
                if one.key == "perception":
                    lines = [
                        dataclasses.replace(line, decides="(searched)" in line.title) for line in one.lines
                    ]
                    parts[0][2].append(dataclasses.replace(one, key="perception_searched", lines=lines))
            continue
        scale = f", {run.partition('/')[0]}" if "/" in run else ""
        parts.append((f"{TITLES[name]}{scale}", found, findings(found)))
    if parts and (gained := search_finding(result["searches"])):
        parts[0][2].append(gained)
    return parts


def page(
    results: Sequence[Mapping[str, Any]],
    notes: Mapping[str, Mapping[str, str]],
    paper: Mapping[str, Any],
    images: Mapping[str, Mapping[str, str]],
) -> str:
    """The page; `images` {experiment: {caption: path}}."""
    lines = [
        "# The paper's findings, on real data",
        "",
        "Written by `launch/results_doc.py` from `docs/results/*.json`; edit those, not this page.",
        "",
        "Small networks, trained for minutes on one core of a processor, on data that anyone can have: enough to see "
        "whether a finding appears, not to reach the paper's figures. A finding has appeared where the 95% interval of "
        "the difference over the same pictures leaves out 0, at the model's own sampler. `the opposite`: it leaves out "
        "0 on the other side. `in part`: so for some of the measures alone. `not decided`: the interval holds 0.",
        "",
    ]
    parts = [(result, *part) for result in results for part in sections(result)]
    lines += ["| finding | " + " | ".join(title for _, title, _, _ in parts) + " |"]
    lines += ["| --- |" + " --- |" * len(parts)]
    for key, words in KEYS.items():
        verdicts = [_verdict_of(found, key) for _, _, _, found in parts]
        lines += [f"| {words} | " + " | ".join(verdicts) + " |"]
    lines += ["", "## The paper's own tables", "", f"From {paper['source']}.", ""]
    for table in paper["tables"]:
        lines += [f"{table['title']}:", "", tables.table(table["head"], table["rows"]), ""]
    for result in results:
        lines += experiment(result, notes.get(result["name"], {}), images.get(result["name"], {}))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _verdict_of(found: Sequence[Finding], key: str) -> str:
    return next((one.verdict for one in found if one.key == key), "-")


def experiment(result: Mapping[str, Any], notes: Mapping[str, str], images: Mapping[str, str]) -> list[str]:
    """The part of the page that is one experiment's."""
    lines = [f"## {TITLES[result['name']]}", ""]
    if "general" in notes:
        lines += [notes["general"], ""]
    lines += ["```bash", *result["commands"][:1], "```", ""]
    if result["training"]:
        lines += [trainings(result["training"]), ""]
        missing = [one for one in results_figures.TRAINED[result["name"]] if one not in result["training"]]
        lines += [f"Not evaluated yet: {', '.join(missing)}.", ""] if missing else []
    for title, found, of in sections(result):
        if len(result["runs"]) > 1 and title != TITLES[result["name"]]:
            lines += [f"### {title}", ""]
        prefix = title.partition(", ")[2] + " " if result["name"] == "orl" else ""
        lines += [tables.means_table(found["rows"]), ""]
        lines += ["<details><summary>95% intervals and how the figures were made</summary>", ""]
        lines += [tables.intervals_table(found["rows"]), "", *(f"- {line}" for line in protocol(found))]
        lines += ["", "</details>", ""]
        for one in of:
            lines += [*finding(one), ""]
            note = notes.get(f"{prefix}{one.key}")
            lines += [note, ""] if note else []
    if run := result["runs"].get("patches"):
        side = run["protocol"]["features"]["patch"]
        lines += [f"### In patches of {side}x{side} pixels", "", tables.means_table(run["rows"]), ""]
    lines += swept(result)
    lines += [notes["sweep"], ""] if "sweep" in notes and "sweep" in result["runs"] else []
    lines += diverse(result)
    lines += searched(result)
    for caption, image in images.items():
        lines += [f"![{caption}]({image})", "", f"*{caption}*", ""]
    if result.get("credits"):
        lines += ["Photographs shown, under their own licences: " + "; ".join(result["credits"]) + ".", ""]
    lines += ["<details><summary>Every command</summary>", "", "```bash", *result["commands"][1:], "```", ""]
    lines += ["</details>", "", f"{made(result)} {notes.get('machine', '')}".strip(), ""]
    return lines


def finding(one: Finding) -> list[str]:
    """Title, verdict and the differences."""
    columns = [key for key in one.wanted if any(key in line.cells for line in one.lines)]
    body = [[line.title, *(cell(key, line.cells.get(key)) for key in columns)] for line in one.lines]
    return [
        f"**{one.title}.** {one.sentence}",
        "",
        tables.table(["method", *(HEADINGS.get(key, key) for key in columns)], body),
    ]


def trainings(of: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of what was trained, from the logs."""
    body = []
    for name, one in of.items():
        loss = "regression, MSE" if one["regression"] else f"SR3, {one['norm'].upper()}"
        peak = f"{one['peak']['psnr']:.2f} dB at {one['peak']['step']:,}" if one["peak"] else ""
        body.append(
            [
                name,
                loss,
                f"{one['steps']:,}",
                str(one["batch"]),
                str(one["seed"]),
                f"{one['seconds'] / 60:.1f}",
                peak,
                one.get("hardware", ""),
                one.get("commit", "")[:10],
            ]
        )
    head = [
        "method",
        "loss",
        "steps",
        "batch",
        "seed",
        "minutes",
        "peak held-out PSNR",
        "trained on",
        "commit",
    ]
    return tables.table(head, body)


def protocol(found: Mapping[str, Any]) -> list[str]:
    """One sentence a line, with the models and what the differences are drawn from."""
    lines = [line for line in tables.protocol(found) if not line.startswith("evals, s/picture")]
    lines += tables.models(found)
    count = found["protocol"]["pictures"]
    if found["groups"] < count:
        lines.append(
            f"Differences: the pictures are in {found['groups']} groups (of one photograph or person), which are "
            "drawn again whole; the intervals of the tables of means draw single pictures."
        )
    versions = ", ".join(f"{tool} {version}" for tool, version in found["versions"].items())
    reused = found.get("outputs_reused")
    again = f", of which {reused} outputs were there already" if reused else ""
    lines.append(
        f"`{' '.join(found['command'])}`: {found['seconds']:.0f} s{again}, on {found['date'][:10]} with {versions}."
    )
    return lines


def swept(result: Mapping[str, Any]) -> list[str]:
    """Steps against quality for every solver."""
    run = result["runs"].get("sweep")
    if run is None:
        return []
    pairs = [pair for pair in run["pairs"] if pair["kind"] == "regression - diffusion"]
    better = sum(sign(pair["columns"]["lpips"]) > 0 for pair in pairs if "lpips" in pair["columns"])
    return [
        "### Steps against quality, every solver",
        "",
        tables.means_table(run["rows"]),
        "",
        f"By {better} of these {len(pairs)} samplers SR3 is better in LPIPS than the regression by more than chance, "
        "over the same pictures.",
        "",
        *(f"- {line}" for line in protocol(run)[:1]),
        "",
    ]


def diverse(result: Mapping[str, Any]) -> list[str]:
    """How much the outputs of one input differ."""
    run = result["runs"].get("diversity")
    if run is None:
        return []
    keys = [
        key
        for key in ("diversity", "diversity_lpips", "lpips")
        if any(key in row["summary"] for row in run["rows"])
    ]
    body = [
        [title_of(row), *(_interval(key, row["summary"].get(key)) for key in keys)]
        for row in run["rows"]
        if "diversity" in row["summary"]
    ]
    count, samples = run["protocol"]["pictures"], run["protocol"]["samples"]
    return [
        "### Diversity",
        "",
        f"Of {samples} outputs of each of {count} pictures: their standard deviation in 255 levels"
        f"{', the LPIPS between them, and to the original' * ('lpips' in keys)}, with 95% intervals.",
        "",
        tables.table(["method", *(HEADINGS[key] for key in keys)], body),
        "",
    ]


def _interval(key: str, of: Mapping[str, float] | None) -> str:
    if of is None:
        return ""
    mean, low, high = (f"{of[end]:.{DIGITS[key]}f}" for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def searched(result: Mapping[str, Any]) -> list[str]:
    """What the schedule searches found, and how a found one does on the pictures of the main table."""
    lines: list[str] = []
    if run := result["runs"].get("searched"):
        lines += ["### With and without a found schedule", "", tables.means_table(run["rows"]), ""]
    for search in result["searches"]:
        text = search_report.markdown(search).replace("# Schedule", "### Schedule", 1)
        lines += [text.strip(), "", f"{search['seconds']:.0f} s: `{' '.join(search['command'])}`", ""]
    return lines


def made(result: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    runs = result["runs"].values()
    hardware = ", ".join(dict.fromkeys(run["hardware"] for run in runs))
    minutes = sum(run["seconds"] for run in runs) / 60
    trained = sum(one["seconds"] for one in result["training"].values()) / 60
    return (
        f"Trained for {trained:.0f} minutes and evaluated for {minutes:.0f} on {hardware}; collected on "
        f"{result['date'][:10]} at commit {result['commit'][:10] or 'unknown'}."
    )


def curve(run: Mapping[str, Any], levels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The panels of the curve of a sweep. Levels: the regression's and bicubic's, of the same pictures."""
    panels: dict[str, Any] = {}
    for key in CURVES:
        curves: dict[str, list[tuple[float, float]]] = {}
        lines = {}
        for row in run["rows"]:
            value = row["summary"].get(key, {}).get("mean")
            if value is None:
                continue
            if row["solver"] and not row.get("detail"):
                curves.setdefault(row["solver"], []).append((row["evaluations"], value))
            elif not row["solver"]:
                lines[row["method"]] = value
        if curves:
            panels[HEADINGS[key]] = (curves, lines)
    return panels


def draw(result: Mapping[str, Any], out: Path | None, folder: Path) -> None:
    """Write the pictures of an experiment into docs/images; grids only while its folder is there."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["name"]
    if "sweep" in result["runs"] and (panels := curve(result["runs"]["sweep"])):
        drawn = Image.fromarray(results_curve.picture(panels, axis="network evaluations"))
        _write(folder / f"results_{name}_curve", drawn)
    for run in result["runs"]:
        if out is None or run in SIDE:
            continue
        for file in ("grid", "grid_sr3"):
            if (out / run / f"{file}.png").is_file():
                scale = f"_{run.partition('/')[0]}" if "/" in run else ""
                suffix = "_samplers" if file == "grid_sr3" else ""
                with Image.open(out / run / f"{file}.png") as picture:
                    _write(folder / f"results_{name}{scale}{suffix}", picture.convert("RGB"))


def _write(stem: Path, picture: Image.Image) -> None:
    """PNG, or the best JPEG that is small enough; of very small pictures every pixel four times."""
    if picture.width < 500:
        picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    for old in stem.parent.glob(f"{stem.name}.*"):
        old.unlink()
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    suffix, quality = ".png", 95
    while len(data.getvalue()) > LARGEST and quality > 30:
        data, suffix = io.BytesIO(), ".jpg"
        picture.save(data, "JPEG", quality=quality, subsampling=0)
        quality -= 5
    stem.with_suffix(suffix).write_bytes(data.getvalue())


def shown(result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """{caption: path} of the pictures that are there."""
    name, found = result["name"], {}
    for run in result["runs"]:
        if run in SIDE:
            continue
        scale = run.partition("/")[0] if "/" in run else ""
        label = f" At {scale}." if scale else ""
        stem = f"results_{name}{'_' * bool(scale)}{scale}"
        found[f"The worst, median and best picture by SR3's PSNR, by every method.{label}"] = stem
        found[f"The same pictures by SR3 at other numbers of steps.{label}"] = f"{stem}_samplers"
    found["Steps against quality: mean over the pictures of the table."] = f"results_{name}_curve"
    paths = {caption: sorted(folder.glob(f"{stem}.*")) for caption, stem in found.items()}
    return {caption: f"{folder.name}/{of[0].name}" for caption, of in paths.items() if of}


def dry_run(name: str, out: str) -> list[str]:
    """The one command, then all that it runs."""
    script = ROOT / "launch" / "experiment.sh"
    more = ["PHOTOS"] if name == "photos" else []
    ran = subprocess.run(
        ["bash", str(script), "--dry-run", name, out, *more], capture_output=True, text=True, check=True
    )
    return [" ".join(["bash launch/experiment.sh", name, out, *more]), *ran.stdout.splitlines()]


def write(docs: Path) -> Path:
    """docs/results.md from docs/results/*.json."""
    folder = docs / "results"
    files = [folder / f"{name}.json" for name in TITLES]
    results = [results_figures.read(file) for file in files if file.is_file()]
    if not results:
        raise UserError(f"{folder} has no results: run launch/experiment.sh first")
    notes = results_figures.read(folder / "notes.json") if (folder / "notes.json").is_file() else {}
    paper = results_figures.read(ROOT / "docs" / "results" / "paper.json")
    images = {result["name"]: shown(result, docs / "images") for result in results}
    write_text(docs / "results.md", page(results, notes, paper, images))
    return docs / "results.md"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", nargs=2, metavar=("NAME", "OUT"), help=f"one of {', '.join(TITLES)}")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="default: %(default)s")
    parser.add_argument("--credits", type=Path, metavar="CSV", help="who made the photographs")
    parser.add_argument("--store", nargs=2, type=Path, metavar=("SEARCH_JSON", "MODEL"))
    parser.add_argument("--stamp", type=Path, metavar="WORKDIR")
    args = parser.parse_args(argv)
    try:
        if args.stamp:
            results_figures.stamp(args.stamp)
            return 0
        if args.store:
            results_figures.store_found(*args.store)
            return 0
        if args.collect:
            name, out = args.collect
            if name not in TITLES:
                raise UserError(f"--collect takes one of {', '.join(TITLES)}, got {name!r}")
            result = results_figures.collect(
                name, Path(out), commands=dry_run(name, out), credits=args.credits
            )
            (args.docs / "results").mkdir(parents=True, exist_ok=True)
            write_text(args.docs / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
            draw(result, Path(out), args.docs / "images")
        print(f"{write(args.docs)} is written")
    except UserError as error:
        print(f"results_doc.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
