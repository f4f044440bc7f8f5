"""What a training job needs, before paying for it: sr3 plan --config=NAME_OR_FILE --topology=v5e:16x16."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sr3_jax.cli._options import add_config_argument

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to config.load
LINE_EVERY = 30.0  # seconds, where stderr is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to plan, for what, and where to write it."""
    add_config_argument(parser, help_of="sr3 train")
    parser.add_argument(
        "--topology",
        required=True,
        help="v5e:16x16, v6e:4x4, v4:4x4x4, v5p:4x4x4, gpu:8xh100, cpu:8 and the like",
    )
    parser.add_argument(
        "--only",
        choices=("train", "sample"),
        help="the training step alone, or the held-out evaluation alone",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="from shapes alone, in seconds, without the TPU's compiler"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="less effort of the compiler: sooner, with memory above the truth",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="compile again what an earlier plan has compiled"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")


def run(args: argparse.Namespace) -> int:
    """0 when it fits, 1 when it does not."""
    import jax

    # Chips that are only planned for need none that are here; a plan must not take a GPU from a job.
    jax.config.update("jax_platforms", "cpu")
    from sr3_jax.config import load_config
    from sr3_jax.files import write_text
    from sr3_jax.planning import cache as plan_cache
    from sr3_jax.planning import text as plan_text
    from sr3_jax.planning.plan import plan
    from sr3_jax.planning.topologies import parse
    from sr3_jax.train.experiment import read

    topology = parse(args.topology)
    experiment = read(load_config(args.config, args.rest))
    found = plan(
        experiment,
        topology,
        programs=(args.only,) if args.only else ("train", "sample"),
        estimate=args.estimate,
        quick=args.quick,
        cache=plan_cache.folder(),
        refresh=args.refresh,
        watch=watch,
    )
    given = [f"--config={args.config}", f"--topology={topology.name}", *args.rest]
    given += [f"--only={args.only}"] if args.only else []
    given += [f"--{name}" for name in ("estimate", "quick") if getattr(args, name)]
    found = {"name": Path(args.config).stem, "command": " ".join(["sr3 plan", *given]), **found}
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    print(plan_text.report(found))
    return 0 if found["fits"] else 1


@contextmanager
def watch(title: str) -> Iterator[None]:
    """Within it stderr says what is done and for how long: a line that counts up, or a plain one now and then."""
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
