"""Check whether a training job fits a topology, before paying for it.

    sr3 plan --config=NAME_OR_FILE --topology=v5e:16x16

Compiles the training step and the held-out evaluation ahead of time with libtpu, which needs no TPU, and prints FLOPs,
memory per chip and FITS or DOES NOT FIT, with the settings to change. Results are cached. Exit code 0 if the job fits,
1 if it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sr3_jax.cli._options import add_config_argument, config_source, local_path

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to load_config
LINE_EVERY = 30.0  # seconds between progress lines where stderr is not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config_argument(parser, help_of="sr3 train")
    parser.add_argument(
        "--topology",
        required=True,
        help="such as v5e:16x16, v6e:4x4, v4:4x4x4, v5p:4x4x4, gpu:8xh100 or cpu:8; GPUs and CPUs are estimated",
    )
    parser.add_argument(
        "--only",
        choices=("train", "sample"),
        help="plan only the training step, or only the held-out evaluation",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="estimate from shapes in seconds, without libtpu: the state is exact, activations follow a rule of thumb",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile with less effort: takes half the time and overestimates memory",
    )
    parser.add_argument("--refresh", action="store_true", help="ignore cached results")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="also write the plan to FILE")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if the job fits, 1 if it does not."""
    import jax

    # Planning needs no device, and must not take a GPU from a running job.
    jax.config.update("jax_platforms", "cpu")
    from sr3_jax.config import load_config
    from sr3_jax.files import write_text
    from sr3_jax.planning.plan import plan
    from sr3_jax.planning.report import report
    from sr3_jax.planning.topologies import parse
    from sr3_jax.storage import cache_folder
    from sr3_jax.train.experiment import read

    topology = parse(args.topology)
    config = load_config(config_source(args.config), args.rest)
    if config["model"]["learned_variance"]:  # of a converted model, which cannot be trained with it
        print("note: planned without the learned variance, three more channels of the output")
        config["model"]["learned_variance"] = False
        if config["sampling"]["solver"] == "ancestral_learned":
            config["sampling"]["solver"] = "ancestral"
    experiment = read(config)
    found = plan(
        experiment,
        topology,
        programs=(args.only,) if args.only else ("train", "sample"),
        estimate=args.estimate,
        quick=args.quick,
        cache=cache_folder("plans"),
        refresh=args.refresh,
        watch=watch,
    )
    given = [f"--config={args.config}", f"--topology={topology.name}", *args.rest]
    given += [f"--only={args.only}"] if args.only else []
    given += [f"--{name}" for name in ("estimate", "quick") if getattr(args, name)]
    found = {"name": Path(args.config).stem, "command": " ".join(["sr3 plan", *given]), **found}
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    print(report(found))
    return 0 if found["fits"] else 1


@contextmanager
def watch(title: str) -> Iterator[None]:
    """Report the elapsed seconds on stderr: a line that counts up on a terminal, else a line every half minute."""
    done, start, live = threading.Event(), time.monotonic(), sys.stderr.isatty()

    def say() -> None:
        while not done.wait(1.0 if live else LINE_EVERY):
            seconds = time.monotonic() - start
            print(f"{title}: {seconds:.0f} s", end="\r" if live else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if live:
            print(" " * (len(title) + 12), end="\r", file=sys.stderr, flush=True)
