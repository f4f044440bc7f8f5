"""Computes the plans of docs/pods/plans.md: `sr3 plan` for every preset and topology that has no JSON file yet.

    python -m experiments.plans                    # all missing rows, training steps first: many hours on two cores
    python -m experiments.plans --rows 1           # the next one
    python -m experiments.plans --program train    # only training steps
    python -m experiments.plans --quick            # lower compiler effort: half the time, memory is an upper bound

Needs the TPU compiler but no TPU: pip install -e '.[tpu]'. It can be stopped at any time and continues where it was.
A row that does not fit is planned again with the changes that the plan suggests, at most twice.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import DOCS, ROOT, read_json, write_json

PRESETS = ("faces_16_128", "imagenet_64_256", "faces_64_512", "faces_256_1024")
TOPOLOGIES = ("v5e:16x16", "v4:4x4x4", "v6e:4x4")
ONE_CHIP = "v6e:1x1"  # for the memory of a single image of the largest preset
# Settings besides the preset's own, where an earlier plan did not fit.
SETTINGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("faces_64_512", "v6e:4x4"): ("--config.train.accumulation=2",),
    ("faces_256_1024", "v6e:4x4"): ("--config.train.accumulation=2",),
    ("faces_256_1024", ONE_CHIP): (
        "--config.eval.num_images=1",
        "--config.mesh.fsdp=1",
        "--config.train.batch_size=1",
    ),
}
TRIES = 3
Row = tuple[str, str, str]  # preset, topology, program


def wanted() -> Iterator[Row]:
    """All rows, in the order in which they are computed."""
    for program in ("train", "sample"):
        for preset in PRESETS:
            for topology in TOPOLOGIES:
                yield preset, topology, program
    yield PRESETS[-1], ONE_CHIP, "sample"


def file_of(folder: Path, row: Row) -> Path:
    """The JSON file of a row."""
    preset, topology, program = row
    return folder / f"{preset}_{topology.replace(':', '_')}_{program}.json"


def missing(folder: Path) -> list[str]:
    """The rows without a JSON file, in words."""
    rows = [row for row in wanted() if not file_of(folder, row).is_file()]
    return [f"{preset} on {topology} ({program})" for preset, topology, program in rows]


def arguments(row: Row, overrides: Sequence[str]) -> list[str]:
    """The command of a row, without `sr3`."""
    preset, topology, program = row
    return [
        "plan",
        f"--config=configs/{preset}.py",
        f"--topology={topology}",
        f"--only={program}",
        *overrides,
    ]


def compute(
    row: Row, folder: Path, *, run: Callable[[list[str]], dict[str, Any]], quick: bool = False
) -> dict[str, Any]:
    """Plan a row and write its file; while it does not fit, plan it again with the plan's own suggestions.

    Args:
        run: runs `sr3` with these arguments and returns the plan.
    """
    overrides = list(SETTINGS.get(row[:2], ())) + ["--quick"] * quick
    for attempt in range(1, TRIES + 1):
        plan = run(arguments(row, overrides))
        change = plan["programs"][row[2]].get("suggestion", {"overrides": []})["overrides"]
        if plan["fits"] or not change or attempt == TRIES:
            break
        changed = {option.partition("=")[0] for option in change}
        overrides = [option for option in overrides if option.partition("=")[0] not in changed] + list(change)
    write_json(file_of(folder, row), plan)
    return plan


def sr3_plan(options: list[str]) -> dict[str, Any]:
    """Run `sr3 plan` in its own process, which returns its memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        subprocess.run([sys.executable, "-m", "sr3_jax", *options, f"--json={file}"], cwd=ROOT, check=False)
        if not file.is_file():
            raise SystemExit(f"sr3 {shlex.join(options)} failed: see its message above")
        return read_json(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10**6, help="compute at most this many rows")
    parser.add_argument("--program", choices=("train", "sample"), help="compute only this program")
    parser.add_argument("--quick", action="store_true", help="lower compiler effort")
    args = parser.parse_args(argv)
    folder = DOCS / "pods"
    rows = [row for row in wanted() if not file_of(folder, row).exists() and args.program in (None, row[2])]
    for row in rows[: args.rows]:
        print(f"planning {row[0]} on {row[1]}: {row[2]}", file=sys.stderr, flush=True)
        compute(row, folder, run=sr3_plan, quick=args.quick)
    print("To update the page: python -m experiments.pages pods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
