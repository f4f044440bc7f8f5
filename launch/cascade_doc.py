#!/usr/bin/env python
"""Writes docs/cascade.md and its images from what launch/cascade_measure.py measured; nothing there is typed by hand.

python launch/cascade_doc.py docs/cascade/measured.json --images OUT/images
python launch/cascade_doc.py --settings docs/cascade/measured.json   # the chosen options of `sr3 cascade`, alone
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sr3_jax.evaluation import tables

ROOT = Path(__file__).resolve().parent.parent
Row = Mapping[str, Any]


def settings(found: Mapping[str, Any]) -> str:
    """The guidance and the strength that were chosen, as options."""
    return f"--guidance {found['guidance']:g} --augment {found['strength']:g}"


def accuracy(row: Row) -> str:
    """Percent, with its interval."""
    of = row["accuracy"]
    return f"{100 * of['mean']:.1f} ({100 * of['low']:.1f}..{100 * of['high']:.1f})"


def table(headings: Sequence[str], rows: Sequence[tuple[Sequence[str], Row]]) -> str:
    """Some columns of words, then accuracy and distance."""
    body = [[*words, accuracy(row), f"{row['frechet']:.3f}"] for words, row in rows]
    return tables.table([*headings, "label recognised, %", "distance"], body)


def pick(found: Mapping[str, Any], **facts: Any) -> list[Row]:
    """The rows with these facts."""
    return [row for row in found["rows"] if all(row.get(name) == value for name, value in facts.items())]


def side(row: Row) -> str:
    """The size in words."""
    return f"{row['size']}x{row['size']}"


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    best, strength = found["guidance"], found["strength"]
    chains = pick(found, group="chain", size=32)
    generate_jit = {
        row["strength"] if row["augmented"] else "plain": row
        for row in chains
        if row["origin"] == "generate_jit"
    }
    real = pick(found, group="real")
    ablation = sorted(
        pick(found, group="chain"),
        key=lambda row: (row["origin"], row["size"], row["augmented"], row["strength"]),
    )
    return "\n".join(
        [
            "# A cascade that anyone can train",
            "",
            "Written by `launch/cascade_doc.py` from the measurements of `launch/cascade_measure.py`; edit these "
            "scripts, "
            "not this page.",
            "",
            "Fashion-MNIST, padded to 32x32: a class-conditional base at 8x8, then super-resolution stages to 16x16 "
            "and "
            "32x32, each trained on its own. After the data, two commands train and sample it:",
            "",
            "```bash",
            "python launch/make_dataset.py fashion_mnist_32",
            "sr3 train --config=configs/cascade_fashion_32.py --workdir=out/cascade",
            f"sr3 cascade --stages out/cascade -n 100 {settings(found)} -o out/images",
            "```",
            "",
            "The stages that were measured here come with the package, rounded to bfloat16, "
            "and one command is enough:",
            "",
            "```bash",
            f"sr3 cascade --stages fashion_base_8 fashion_8_16 fashion_16_32 -n 100 {settings(found)} -o out/images",
            "```",
            "",
            f"Training took {sum(stage['minutes'] for stage in found['training'].values()):.0f} minutes ("
            + ", ".join(f"{k} {v['steps']} steps of {v['batch_size']}" for k, v in found["training"].items())
            + "). "
            f"`bash launch/cascade.sh out` does that and everything on this page. Measured on {found['hardware']} in "
            f"{found['seconds'] / 60:.0f} minutes, training not counted; {found['count']} images for each figure, "
            f"as many "
            f"of each class, seed 0; samplers {', '.join(f'{k} {v} steps' for k, v in found['samplers'].items())}.",
            "",
            "- label recognised: the share of images whose label a classifier of real images (`sr3 "
            "train-classifier`, "
            f"SHA-256 {found['classifier']['sha256'][:16]}) gives back, with {tables.LEVEL:.0%} bootstrap "
            f"intervals. Smaller "
            "images are enlarged for it.",
            f"- distance: Frechet distance in that classifier's features to {found['count']} real test images of "
            f"the same "
            "size. It is no FID, and is biased upward at this number of images, as the row of other real images "
            "shows.",
            "- strength, then guidance, are chosen by the distance of the 32x32 images to training images instead.",
            "",
            "![A row of images for each label](images/cascade_grid.png)",
            "",
            "Each image of the next page is generate_jit at 8x8, then made larger twice:",
            "",
            "![The stages of eight images](images/cascade_stages.png)",
            "",
            "## What the stages reach",
            "",
            table(
                ["images", "size"],
                [(("real, others", side(row)), row) for row in real]
                + [
                    ((f"generate_jit, guidance {best:g}", side(row)), row)
                    for row in pick(found, group="base", guidance=best)
                ]
                + [
                    ((f"generate_jit, guidance {best:g}", side(row)), row)
                    for row in pick(found, group="guidance", guidance=best)
                ],
            ),
            "",
            "## Augmentation of the condition",
            "",
            verdict(generate_jit["plain"], generate_jit[0.0], generate_jit[strength], strength),
            "",
            "All at guidance 1. 'From real' begins with real 8x8 images in place of the base's: what is lost there, "
            "the super-resolution stages lose alone. 'Strength' is the augmentation while sampling, which the stages "
            "are told.",
            "",
            table(
                ["from", "size", "trained with", "strength"],
                [
                    (
                        (
                            row["origin"],
                            side(row),
                            "noise" if row["augmented"] else "clean conditions",
                            f"{row['strength']:g}",
                        ),
                        row,
                    )
                    for row in ablation
                ],
            ),
            "",
            "The paper's ablation (section 4.4, ImageNet 256x256): FID 13.1 without blur of the condition, 11.3 "
            "with it.",
            "",
            "## Guidance",
            "",
            "How far the base goes from its prediction without the label towards, and beyond, the one with it: at "
            "8x8, and "
            f"through the whole cascade at strength {strength:g}.",
            "",
            table(
                ["size", "guidance"],
                [
                    ((side(row), f"{row['guidance']:g}"), row)
                    for group in ("base", "guidance")
                    for row in pick(found, group=group)
                ],
            ),
            "",
            "Weights, SHA-256: "
            + ", ".join(f"{name} {digest[:16]}" for name, digest in found["stages"].items())
            + ".",
            "",
        ]
    )


def verdict(plain: Row, clean: Row, chosen: Row, strength: float) -> str:
    """Whether it helped, by the figures at 32x32."""
    helped = chosen["frechet"] < plain["frechet"]
    return (
        f"At 32x32 the cascade's distance is {plain['frechet']:.3f} where its stages were trained on clean "
        f"conditions, "
        f"{clean['frechet']:.3f} where they were trained on noisy ones and are given clean ones, and "
        f"{chosen['frechet']:.3f} at the chosen strength of {strength:g}: augmentation "
        f"{'helps' if helped else 'does not help'} here."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", type=Path)
    parser.add_argument("--settings", action="store_true", help="print the chosen options and write nothing")
    parser.add_argument("--images", type=Path, help="the output of sr3 cascade, for its pages")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    try:
        found = json.loads(args.measured.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(
            f"{args.measured} cannot be read ({error}): make it by launch/cascade_measure.py", file=sys.stderr
        )
        return 2
    if args.settings:
        print(settings(found))
        return 0
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    if args.images is not None:
        for name in ("grid", "stages"):
            shutil.copy(args.images / f"{name}.png", args.output / "images" / f"cascade_{name}.png")
    (args.output / "cascade.md").write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
