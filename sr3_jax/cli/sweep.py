"""Train a grid of configs one after another: sr3 sweep --config=NAME_OR_FILE --grid SECTION.FIELD=A,B --workdir=DIR.

Each combination of values is a run of sr3 train in a folder of DIR that is named by its values. Run the same command
again to continue: finished runs are skipped and others resumed. A run that fails is named, the others go on, and the
exit code is 1. DIR gets summary.json and summary.csv with the last and the best held-out metrics of each run.
"""

from __future__ import annotations

import argparse

from sr3_jax.cli._options import add_config_argument, local_path, whole

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to every run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config, the grid and the workdir."""
    add_config_argument(parser, help_of="sr3 train")
    parser.add_argument(
        "--grid", action="append", required=True, metavar="SECTION.FIELD=A,B",
        help="values of a field; repeat for all combinations with another. ';' separates tuples: "
        "'model.multipliers=1,2;1,4'",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, type=local_path, help="folder for the workdirs and the summary"
    )
    parser.add_argument(
        "--index", metavar="N", help="train only run N, from 0: for job arrays, $SLURM_ARRAY_TASK_ID"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and their results; train nothing")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when all runs are finished, 1 when some failed, 128 + the signal's number when one stopped it."""
    from sr3_jax.image_io.errors import printable
    from sr3_jax.train.sweep import plan_sweep, render, run_sweep, summarize

    index = None if args.index is None else whole("--index", args.index, least=0)
    runs = plan_sweep(args.config, args.grid, args.rest)
    code = 0 if args.list else run_sweep(runs, args.workdir, index=index)
    table = [str(args.workdir), *render(summarize(runs, args.workdir)).splitlines()]
    print("\n".join(map(printable, table)))
    return code
