#!/usr/bin/env python
"""Writes docs/results.md and its images from docs/results/*.json; nothing on that page is typed by hand.

    python launch/results_doc.py                        # the page, from what was collected
    python launch/results_doc.py --collect photos OUT   # first collect an experiment's figures from its folder
    python launch/results_doc.py --stamp WORKDIR        # note the commit and the machine beside a training
    python launch/results_doc.py --store SEARCH_JSON MODEL   # what a search found, beside a model

launch/experiment.sh does all of it. notes.json beside the collected figures explains findings: {experiment: {finding:
sentences}}; paper.json has the paper's own tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import results_figures
import results_images
from results_page import page
from results_parts import TITLES

from sr3_jax.errors import UserError
from sr3_jax.files import write_text

ROOT = Path(__file__).resolve().parent.parent


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
    images = {result["name"]: results_images.shown(result, docs / "images") for result in results}
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
            results_images.draw(result, Path(out), args.docs / "images")
        print(f"{write(args.docs)} is written")
    except UserError as error:
        print(f"results_doc.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
