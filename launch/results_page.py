"""docs/results.md as text, from collected figures, notes and the paper's own tables. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from results_figures import TRAINED
from results_findings import HEADINGS, Finding, cell, sign, title_of
from results_parts import TITLES, Part, parts

from sr3_jax.evaluation import tables
from sr3_jax.metrics import METRICS

KEYS = {
    "distortion": "regression above SR3 in PSNR, SSIM",
    "perception": "SR3 better in feature distance, LPIPS",
    "patches": "SR3 better in feature distance of patches",
    "consistency": "both agree with the low-res",
    "recognition": "a small classifier better on SR3's outputs than on the regression's",
    "recognition_bicubic": "a small classifier better on SR3's outputs than on bicubic's",
    "recognition_alexnet": "a layer on AlexNet better on SR3's outputs than on the regression's",
    "recognition_bicubic_alexnet": "a layer on AlexNet better on SR3's outputs than on bicubic's",
    "norm": "L1 better than L2 in feature distance",
    "diversity": "L1 less diverse than L2",
    "searched": "the paper's sampler better with a searched schedule",
}


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
        "the difference over the same images leaves out 0, at the model's own sampler. `the opposite`: it leaves out "
        "0 on the other side. `in part`: so for some of the measures alone. `not decided`: the interval holds 0.",
        "",
    ]
    judged = [part for result in results for part in parts(result)]
    lines += ["| finding | " + " | ".join(part.title for part in judged) + " |"]
    lines += ["| --- |" + " --- |" * len(judged)]
    for key, words in KEYS.items():
        verdicts = [_verdict_of(part.findings, key) for part in judged]
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
        missing = [one for one in TRAINED[result["name"]] if one not in result["training"]]
        lines += [f"Not evaluated yet: {', '.join(missing)}.", ""] if missing else []
    for part in parts(result):
        lines += [f"### {part.title}", ""] if part.name else []
        lines += of_part(part, notes)
    for caption, image in images.items():
        lines += [f"![{caption}]({image})", "", f"*{caption}*", ""]
    if result.get("credits"):
        lines += ["Photographs shown, under their own licences: " + "; ".join(result["credits"]) + ".", ""]
    lines += ["<details><summary>Every command</summary>", "", "```bash", *result["commands"][1:], "```", ""]
    lines += ["</details>", "", f"{made(result)} {notes.get('machine', '')}".strip(), ""]
    return lines


def of_part(part: Part, notes: Mapping[str, str]) -> list[str]:
    """Tables and findings; a note is found under '8x distortion' where the part is named '8x'."""

    def note(key: str) -> list[str]:
        found = notes.get(f"{part.name} {key}".strip())
        return [found, ""] if found else []

    mark = "####" if part.name else "###"
    lines = evaluation(part.runs["evaluation"])
    for one in part.findings:
        lines += [*finding(one), "", *note(one.key)]
    if run := part.runs.get("patches"):
        side = run["protocol"]["features"]["patch"]
        lines += [f"{mark} In patches of {side}x{side} pixels", "", *evaluation(run)]
    if run := part.runs.get("recognition"):
        lines += [f"{mark} Recognition by a linear layer on AlexNet", "", *evaluation(run)]
    if run := part.runs.get("sweep"):
        lines += [f"{mark} Steps against quality, every solver", "", *swept(run), *note("sweep")]
    if run := part.runs.get("diversity"):
        lines += [f"{mark} Diversity", "", *diverse(run)]
    if run := part.runs.get("searched"):
        lines += [f"{mark} With and without a found schedule", "", *evaluation(run)]
    for search in part.searches:
        text = tables.search_markdown(search).replace("# Schedule", f"{mark} Schedule", 1)
        lines += [text.strip(), "", f"{search['seconds']:.0f} s: `{' '.join(search['command'])}`", ""]
    return lines


def evaluation(found: Mapping[str, Any]) -> list[str]:
    """The means, and folded away their intervals and how they were made."""
    lines = [tables.means_table(found["rows"]), ""]
    lines += ["<details><summary>95% intervals and how the figures were made</summary>", ""]
    lines += [tables.intervals_table(found["rows"]), "", *(f"- {line}" for line in protocol(found))]
    return [*lines, "", "</details>", ""]


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
    """One sentence a line, with the models and what the differences are generate_jit from."""
    lines = [line for line in tables.protocol(found) if not line.startswith("s/image")]
    lines += tables.models(found)
    count = found["protocol"]["images"]
    if found["groups"] < count:
        lines.append(
            f"Differences: the images are in {found['groups']} groups (of one photograph or person), which are "
            "generate_jit again whole; the intervals of the tables of means draw single images."
        )
    versions = ", ".join(f"{tool} {version}" for tool, version in found["versions"].items())
    reused = found.get("outputs_reused")
    again = f", of which {reused} outputs were there already" if reused else ""
    lines.append(
        f"`{' '.join(found['command'])}`: {found['seconds']:.0f} s{again}, on {found['date'][:10]} with {versions}."
    )
    return lines


def swept(run: Mapping[str, Any]) -> list[str]:
    """Steps against quality for every solver."""
    lines = evaluation(run)
    pairs = [pair for pair in run["pairs"] if pair["kind"] == "regression - diffusion"]
    for key in ("lpips", "frechet_alexnet", "frechet_classifier"):
        judged = [pair["columns"][key] for pair in pairs if key in pair["columns"]]
        if judged:
            better = sum(sign(one) > 0 for one in judged)
            return [
                *lines,
                f"By {better} of these {len(judged)} samplers SR3 is better in {HEADINGS[key]} than the regression by "
                "more than chance, over the same images.",
                "",
            ]
    return lines


def diverse(run: Mapping[str, Any]) -> list[str]:
    """How much the outputs of one input differ."""
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
    count, samples = run["protocol"]["images"], run["protocol"]["samples"]
    return [
        f"Of {samples} outputs of each of {count} images: their standard deviation in 255 levels"
        f"{', the LPIPS between them, and to the ground truth' * ('lpips' in keys)}, with 95% intervals.",
        "",
        tables.table(["method", *(HEADINGS[key] for key in keys)], body),
        "",
    ]


def _interval(key: str, of: Mapping[str, float] | None) -> str:
    if of is None:
        return ""
    mean, low, high = (METRICS[key].format(of[end]) for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


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
