#!/usr/bin/env python
"""Write the table of plans in docs/pods.md from docs/pods/*.json; --compute computes the missing rows.

    python launch/plan_doc.py             # only write the table
    python launch/plan_doc.py --compute   # `sr3 plan` for each missing row, training steps first

A row takes up to an hour on two cores; completed rows are kept when the script is interrupted. A row that does not fit
is planned again with the changes that the plan suggests, at most twice.
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

from sr3_jax.planning.programs import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
PAGE, ROWS = ROOT / "docs" / "pods.md", ROOT / "docs" / "pods"
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
PRESETS = ("faces_16_128", "imagenet_64_256", "faces_64_512", "faces_256_1024")
TOPOLOGIES = ("v5e:16x16", "v4:4x4x4", "v6e:4x4")
SINGLE = "v6e:1x1"  # for the largest images also the cost of a single one
# Overrides of the preset, where it does not fit as it is.
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
GIB = 2**30


def wanted() -> Iterator[tuple[str, str, str]]:
    """(preset, topology, program) of every row, in the order in which they are computed."""
    for program in ("train", "sample"):
        for preset in PRESETS:
            for topology in TOPOLOGIES:
                yield preset, topology, program
    yield PRESETS[-1], SINGLE, "sample"


def row_name(preset: str, topology: str, program: str) -> str:
    """The file name of a row."""
    return f"{preset}_{topology.replace(':', '_')}_{program}.json"


def command(preset: str, topology: str, program: str, overrides: Sequence[str]) -> list[str]:
    """The arguments of `sr3` for a row."""
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
    """Plan a row, and again with the suggested changes while it does not fit; write the last plan."""
    overrides = list(SETTINGS.get((preset, topology), ())) + ["--quick"] * quick
    for attempt in range(1, TRIES + 1):
        found = run(command(preset, topology, program, overrides))
        change = found["programs"][program].get("suggestion", {"overrides": []})["overrides"]
        if found["fits"] or not change or attempt == TRIES:
            break
        changed = {given.partition("=")[0] for given in change}
        overrides = [given for given in overrides if given.partition("=")[0] not in changed] + list(change)
    file = (ROWS if folder is None else folder) / row_name(preset, topology, program)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def plan_here(arguments: list[str]) -> dict[str, Any]:
    """Run `sr3 plan` in a separate process, so that its memory is freed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        subprocess.run([sys.executable, "-m", "sr3_jax", *arguments, f"--json={file}"], cwd=ROOT, check=False)
        if not file.is_file():
            raise SystemExit(f"`sr3 plan` failed: sr3 {shlex.join(arguments)}")
        return json.loads(file.read_text(encoding="utf-8"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plans, each with the 'name' of its preset, as a Markdown table."""
    head = ("preset", "topology", "mesh", "program", "TFLOPs", "memory per chip", "", "compiled in")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        for name, program in row["programs"].items():
            cells = (
                row["name"],
                row["topology"],
                f"{row['mesh']['data']} x {row['mesh']['fsdp']}",
                PROGRAMS[name],
                f"{program['flops'] / 1e12:,.0f}",
                f"{program['peak'] / GIB:.1f} of {row['capacity'] / GIB:.1f} GiB",
                "FITS" if program["fits"] else "DOES NOT FIT",
                f"{program['seconds_to_compile']:,.0f} s",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(rows: Sequence[Mapping[str, Any]], missing: Sequence[tuple[str, str, str]]) -> str:
    """The text between the two markers of the page."""
    lines = [
        "Written by `launch/plan_doc.py` from `docs/pods/*.json`, the output of `sr3 plan`; edit the script, not this "
        "table.",
        "",
    ]
    if rows:
        programs = [program for row in rows for program in row["programs"].values()]
        versions = sorted({", ".join(f"{k} {v}" for k, v in one["versions"].items()) for one in programs})
        machines = sorted({one["machine"] for one in programs})
        lines += [
            "The presets at the paper's batch size of 256, compiled ahead of time by libtpu for each slice. Memory is "
            "what the compiler allocates per chip; for a held-out evaluation it includes the rest of the training "
            "state, which stays allocated. FLOPs are those of the whole slice, including recomputation. The mesh is "
            "data x fsdp.",
            "",
            table(rows),
            "",
            "The command of each row:",
            "",
            "```bash",
            *dict.fromkeys(row["command"] for row in rows),
            "```",
            "",
            "With `--quick` the compiler makes less effort and overestimates memory: on a small network its "
            "temporaries were 1.5 times as large. libtpu's ordering of instructions within an operation is always "
            "disabled: it runs after memory is laid out, and on two cores it did not finish within 30 minutes "
            "of CPU time.",
            "",
            f"Compiled on {'; '.join(machines)}, with {'; '.join(versions)}.",
        ]
    if missing:
        names = ", ".join(f"{preset} on {topology} ({program})" for preset, topology, program in missing)
        lines += [
            "",
            f"Not computed yet: {names}. `bash launch/plan_rows.sh` computes them and can be interrupted and "
            "restarted.",
        ]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def write(page: Path = PAGE, folder: Path | None = None) -> None:
    """Write the table of the available rows into the page."""
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
        raise SystemExit(f"{page.name} has no {BEGIN} ... {END}: add these two lines where the table belongs")
    page.write_text(f"{before}{BEGIN}\n{block(rows, missing)}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", action="store_true", help="plan the missing rows")
    parser.add_argument("--rows", type=int, default=10**6, help="plan at most this many rows")
    parser.add_argument("--program", choices=("train", "sample"), help="plan only this program")
    parser.add_argument("--quick", action="store_true", help="compile with less effort")
    args = parser.parse_args(argv)
    left = args.rows
    for preset, topology, program in wanted() if args.compute else ():
        if (
            left
            and args.program in (None, program)
            and not (ROWS / row_name(preset, topology, program)).exists()
        ):
            print(f"{preset} on {topology}: {PROGRAMS[program]}", file=sys.stderr, flush=True)
            ROWS.mkdir(parents=True, exist_ok=True)
            compute(preset, topology, program, run=plan_here, quick=args.quick)
            write()
            left -= 1
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
