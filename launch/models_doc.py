#!/usr/bin/env python
"""Writes docs/models.md and its images from measurements; nothing on that page is typed by hand.

    python launch/models_doc.py docs/models/photo_4x.json \
        --set "Bundled test photographs" out/photos/evaluation.json --set Set14 out/set14/evaluation.json

Each evaluation.json is the work of `sr3 evaluate`, whose grid.png lies beside it. The first argument is a JSON
file with the facts of the training; FACTS below says which. An evaluation of other weights than those of the
model's file is refused.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sr3_jax.errors import UserError
from sr3_jax.evaluation import tables

ROOT = Path(__file__).resolve().parent.parent
CAPTION = (
    "The worst, median and best image by the model's PSNR; of large ones the part that bicubic blurs most."
)
LARGEST = 600_000  # bytes of an image
FACTS = {
    "name": "the model's name, as --model takes it",
    "summary": "a sentence or two: what it is for, and what it is not",
    "file": "its .safetensors file, relative to the repository",
    "commands": "a list: the commands that made it, from data to export",
    "hardware": "what it was trained on",
    "hours": "how long that took",
    "steps": "how many training steps",
    "data": "a list of {'name', 'images', 'licence'}, maybe 'link'",
    "licence": "the licence of the weights",
}  # and, if need be, "notes": a list of sentences


def read_json(path: Path, *, fields: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has these fields."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): mend it") from error
    missing = [field for field in fields if not isinstance(value, dict) or field not in value]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: add it, as launch/models_doc.py describes")
    return value


def page(
    facts: Mapping[str, Any],
    model: Mapping[str, Any],
    megabytes: float,
    sets: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, Mapping[str, str]],
) -> str:
    """The page; `model` is its entry in an evaluation, `images` {set: {caption: path}}."""
    config = model["config"]
    rows = [
        ("file", f"`{facts['file']}`, {megabytes:.1f} MB"),
        ("scale", f"{model['scale']}x"),
        ("weights", f"{model['parameters'] / 1e6:.2f} million, SHA-256 of all `{model['sha256']}`"),
        (
            "diffused",
            f"{config['diffusion']['space']}; the network predicts {config['diffusion']['prediction']}",
        ),
        ("default sampler", f"`{config['sampling']['solver']}`, {config['sampling']['steps']} steps"),
        ("training", f"{facts['steps']:,} steps in {facts['hours']:g} hours on {facts['hardware']}"),
        ("licence of the weights", facts["licence"]),
    ]
    lines = [
        "# Models that come with the package",
        "",
        "Written by `launch/models_doc.py` from the measurements of `sr3 evaluate`; edit that script, not this page.",
        "",
        f"## {facts['name']}",
        "",
        facts["summary"],
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *(f"- {note}" for note in facts.get("notes", ())),
        "",
        "Trained on:",
        "",
        "| data | images | licence |",
        "| --- | ---: | --- |",
        *(f"| {_linked(data)} | {data['images']:,} | {data['licence']} |" for data in facts["data"]),
        "",
        "Made and measured by:",
        "",
        "```",
        *facts["commands"],
        "```",
    ]
    protocols = {name: tables.protocol(evaluation, source=name) for name, evaluation in sets.items()}
    shared = [line for line in next(iter(protocols.values())) if all(line in of for of in protocols.values())]
    for name, evaluation in sets.items():
        lines += ["", f"### {name}", "", tables.means_table(evaluation["rows"])]
        for caption, image in images.get(name, {}).items():
            lines += ["", f"![{caption}]({image})", "", f"*{caption}*"]
        lines += ["", f"{tables.LEVEL:.0%} intervals:", "", tables.intervals_table(evaluation["rows"]), ""]
        lines += [f"- {sentence}" for sentence in protocols[name] if sentence not in shared]
        versions = ", ".join(f"{tool} {version}" for tool, version in evaluation["versions"].items())
        lines += [f"- Measured on {evaluation['date'][:10]} with {versions}."]
    lines += ["", "### How the figures were made", "", *(f"- {sentence}" for sentence in shared)]
    text = "\n".join(lines) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def _linked(data: Mapping[str, Any]) -> str:
    return f"[{data['name']}]({data['link']})" if data.get("link") else data["name"]


def fitted(path: Path) -> tuple[str, bytes]:
    """An image file's suffix and bytes: PNG if that is small enough, else the best JPEG that is."""
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): run sr3 evaluate again") from error
    data = _encoded(rgb, "PNG", optimize=True)
    if len(data) <= LARGEST:
        return ".png", data
    for quality in range(95, 20, -5):
        data = _encoded(rgb, "JPEG", quality=quality, subsampling=0)
        if len(data) <= LARGEST:
            break
    return ".jpg", data


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def evaluated(
    facts: Mapping[str, Any], sha256: str, sets: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The model's entry in the first evaluation; UserError if any evaluation is not of these weights."""
    found = {
        name: [model for model in evaluation["models"] if model["sha256"] == sha256]
        for name, evaluation in sets.items()
    }
    for name, models in found.items():
        if not models:
            raise UserError(
                f"the evaluation of {name} is not of {facts['file']}: run sr3 evaluate with that file as --model"
            )
    return next(iter(found.values()))[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("facts", type=Path, help="docs/models/NAME.json")
    parser.add_argument(
        "--set", nargs=2, action="append", required=True, metavar=("TITLE", "EVALUATION_JSON")
    )
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args(argv)
    try:
        write(args.facts, {title: Path(path) for title, path in args.set}, args.output)
    except UserError as error:
        print(f"models_doc.py: {error}", file=sys.stderr)
        return 2
    return 0


def write(facts_path: Path, paths: Mapping[str, Path], output: Path) -> None:
    """Write the page and, in images/ beside it, the images."""
    from sr3_jax.evaluation.methods import fingerprint
    from sr3_jax.inference.model import load

    facts = read_json(facts_path, fields=list(FACTS))
    wanted = ("rows", "models", "protocol", "hardware", "versions", "date")
    sets = {title: read_json(path, fields=wanted) for title, path in paths.items()}
    file = ROOT / facts["file"]
    model = evaluated(facts, fingerprint(load(file)), sets)
    folder = output.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    # Images of the first set alone: those of others, such as Set14, may not be ours to pass on.
    title, path = next(iter(paths.items()))
    grids = {"grid": CAPTION}
    if (path.parent / f"grid_{model['label']}.png").is_file():
        grids[f"grid_{model['label']}"] = "The same images by every sampler."
    images: dict[str, dict[str, str]] = {title: {}}
    for grid, caption in grids.items():
        suffix, data = fitted(path.parent / f"{grid}.png")
        stem = re.sub(r"\W+", "_", f"{facts['name']} {title}{grid[4:] and ' samplers'}").lower()
        for old in folder.glob(f"{stem}.*"):
            old.unlink()
        (folder / f"{stem}{suffix}").write_bytes(data)
        images[title][caption] = f"images/{stem}{suffix}"
    megabytes = file.stat().st_size / 1e6
    output.write_text(page(facts, model, megabytes, sets, images), encoding="utf-8")
    print(f"{output} and {len(grids)} image(s) in {folder}")


if __name__ == "__main__":
    sys.exit(main())
