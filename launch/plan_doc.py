#!/usr/bin/env python
"""Writes the table of plans into docs/pods.md, from docs/pods/*.json; --compute makes those that are missing.

    python launch/plan_doc.py             # the table alone
    python launch/plan_doc.py --compute   # `sr3 plan` for each missing row, one after another, training steps first

A row takes a quarter of an hour to an hour on two cores; what is done stays done when this is stopped. A row that does
not fit is planned again with the changes that the plan itself names, at most twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sr3_jax.planning import text as plan_text

ROOT = Path(__file__).resolve().parent.parent
PAGE, ROWS = ROOT / "docs" / "pods.md", ROOT / "docs" / "pods"
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
PRESETS = ("faces_16_128", "imagenet_64_256", "faces_64_512", "faces_256_1024")
TOPOLOGIES = ("v5e:16x16", "v4:4x4x4", "v6e:4x4")
SINGLE = "v6e:1x1"  # of the largest images also what a single one takes
# Beside the presets' own mesh: where a first plan did not fit, or an estimate said that it would not.
SETTINGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("faces_64_512", "v6e:4x4"): ("--config.train.accumulation=2",),
    ("faces_256_1024", "v6e:4x4"): ("--config.train.accumulation=2",),
    ("faces_256_1024", SINGLE): (
        "--config.eval.num_images=1",
        "--config.mesh.fsdp=1",
        "--config.train.batch_size=1",
    ),
}
TRIES = 3


def wanted() -> Iterator[tuple[str, str, str]]:
    """(preset, topology, program) of every row, the ones to compute first in front."""
    for program in ("train", "sample"):
        for preset in PRESETS:
            for topology in TOPOLOGIES:
                yield preset, topology, program
    yield PRESETS[-1], SINGLE, "sample"


def row_name(preset: str, topology: str, program: str) -> str:
    """The name of a row's file."""
    return f"{preset}_{topology.replace(':', '_')}_{program}.json"


def command(preset: str, topology: str, program: str, overrides: Sequence[str]) -> list[str]:
    """The command of a row, without `sr3` in front."""
    return [
        "plan",
        f"--config=configs/{preset}.py",
        f"--topology={topology}",
        f"--only={program}",
        *overrides,
    ]


def compute(
    preset: str,
    topology: str,
    program: str,
    *,
    quick: bool = False,
    run: Callable[[list[str]], dict[str, Any]],
    folder: Path | None = None,
) -> dict[str, Any]:
    """Plan a row, again with the plan's own changes while it does not fit; the last plan is the row's."""
    overrides = list(SETTINGS.get((preset, topology), ())) + ["--quick"] * quick
    for attempt in range(1, TRIES + 1):
        found = run(command(preset, topology, program, overrides))
        change = found["programs"][program].get("change", {"overrides": []})["overrides"]
        if found["fits"] or not change or attempt == TRIES:
            break
        changed = {given.partition("=")[0] for given in change}
        overrides = [given for given in overrides if given.partition("=")[0] not in changed] + list(change)
    file = (ROWS if folder is None else folder) / row_name(preset, topology, program)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def plan_here(arguments: list[str]) -> dict[str, Any]:
    """Run `sr3 plan` in a process of its own, which gives its memory back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        subprocess.run([sys.executable, "-m", "sr3_jax", *arguments, f"--json={file}"], cwd=ROOT, check=False)
        if not file.is_file():
            raise SystemExit(f"no plan came of: sr3 {shlex.join(arguments)}")
        return json.loads(file.read_text(encoding="utf-8"))


def block(rows: Sequence[Mapping[str, Any]], missing: Sequence[tuple[str, str, str]]) -> str:
    """What stands between the two comments of the page."""
    lines = [
        "Written by `launch/plan_doc.py` from the results of `sr3 plan`; edit that script, not this table.",
        "",
    ]
    if rows:
        programs = [program for row in rows for program in row["programs"].values()]
        versions = sorted({", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in programs})
        machines = sorted({one["machine"] for one in programs})
        reached = rows[0]["assumed"]
        lines += [
            "The presets at the paper's batch of 256, each program compiled ahead of time by libtpu for that slice. "
            "HBM is what the compiler lays out on each chip; for a held-out evaluation the rest of the training state "
            "is added, which stays beside it. Collectives are the bytes that each chip sends in one run. FLOPs are of "
            "the whole slice, recomputation included. Times are estimates, nobody measured them: "
            f"{reached['flops']:.0%} of the peak FLOP/s, {reached['memory']:.0%} of the memory's bandwidth and "
            f"{reached['interconnect']:.0%} of the links' are assumed, and the range is from all three at once to one "
            "after the other. The mesh is data x fsdp.",
            "",
            plan_text.table(rows),
            "",
            "The command of each row:",
            "",
            "```bash",
            *dict.fromkeys(row["command"] for row in rows),
            "```",
            "",
            "With `--quick` the compiler makes less effort: on a small network its temporaries came out 1.5 times as "
            "large as without. libtpu's ordering of the instructions within an operation is always left out; it comes "
            "after memory is laid out, and on two cores it did not end within half an hour of processor time.",
            "",
            f"Compiled on {'; '.join(machines)}, with {'; '.join(versions)}.",
        ]
    if missing:
        names = ", ".join(f"{preset} on {topology} ({program})" for preset, topology, program in missing)
        lines += [
            "",
            f"Not computed yet: {names}. `bash launch/plan_rows.sh` computes them, one after another; it can be "
            "stopped and started again.",
        ]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def write(page: Path = PAGE, folder: Path | None = None) -> None:
    """Put the table of the rows that there are into the page."""
    rows, missing = [], []
    for preset, topology, program in sorted(
        wanted(), key=lambda row: (PRESETS.index(row[0]), (*TOPOLOGIES, SINGLE).index(row[1]))
    ):
        file = (ROWS if folder is None else folder) / row_name(preset, topology, program)
        if file.is_file():
            rows.append(json.loads(file.read_text(encoding="utf-8")))
        else:
            missing.append((preset, topology, program))
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# Pods\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page.name} has no {BEGIN} ... {END}: add the two lines where the table is to be")
    page.write_text(f"{before}{BEGIN}\n{block(rows, missing)}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", action="store_true", help="plan the rows that are missing")
    parser.add_argument("--rows", type=int, default=10**6, help="at most that many of them")
    parser.add_argument("--program", choices=("train", "sample"), help="of that program alone")
    parser.add_argument("--quick", action="store_true", help="plan them with less effort of the compiler")
    args = parser.parse_args(argv)
    left = args.rows
    for preset, topology, program in wanted() if args.compute else ():
        if (
            left
            and args.program in (None, program)
            and not (ROWS / row_name(preset, topology, program)).exists()
        ):
            print(f"{preset} on {topology}: {plan_text.TITLES[program].lower()}", file=sys.stderr, flush=True)
            ROWS.mkdir(parents=True, exist_ok=True)
            compute(preset, topology, program, run=plan_here, quick=args.quick)
            write()
            left -= 1
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
