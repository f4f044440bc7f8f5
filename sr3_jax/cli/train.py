"""Train a model, or resume its training: sr3 train --config=NAME_OR_FILE --workdir=DIR.

Run the same command again to resume from the newest checkpoint. The config of a cascade trains its stages one after
the other, each in DIR/STAGE; overrides apply to all of them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sr3_jax.cli._options import add_config_argument, any_path, config_source

if TYPE_CHECKING:
    from sr3_jax.train.experiment import Experiment

COMPILED = "compiled"  # the folder of compiled programs in a workdir, with several processes
PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and the workdir; the help lists the fields of a config."""
    add_config_argument(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        type=any_path,
        help="folder for config, checkpoints, metrics and samples, also in a bucket: gs://BUCKET/PATH",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config, the data, the workdir and the memory, print what was found, and stop before training",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when training is complete, 128 + the signal's number when a signal stopped it."""
    from sr3_jax.config.load import load_cascade, load_config
    from sr3_jax.distributed.processes import share_compilation_cache, start_processes
    from sr3_jax.files import make_folder, write_text
    from sr3_jax.inference.stages import PLAN_FILE, check_chain, stage_from_config
    from sr3_jax.memory import use_most_gpu_memory
    from sr3_jax.train.experiment import read
    from sr3_jax.train.loop import train

    use_most_gpu_memory(os.environ)
    source = config_source(args.config)
    configs = load_cascade(source, args.rest)
    if not configs:
        experiment = read(load_config(source, args.rest))
        process, processes = start_processes()
        if args.dry_run:
            return _dry_run({"": experiment}, args.workdir, process)
        share_compilation_cache(args.workdir / COMPILED, processes=processes)
        return _leave(train(experiment, args.workdir))
    experiments = [read(config) for config in configs]  # check all stages before training the first
    names = [config["stage"]["name"] for config in configs]
    taken: set[str] = set()
    check_chain(
        [
            stage_from_config(config, name, name=name, taken=taken)
            for config, name in zip(configs, names, strict=True)
        ]
    )
    process, processes = start_processes()
    if args.dry_run:
        return _dry_run(dict(zip(names, experiments, strict=True)), args.workdir, process)
    share_compilation_cache(args.workdir / COMPILED, processes=processes)
    if process == 0:
        write_text(make_folder(args.workdir) / PLAN_FILE, json.dumps({"stages": names}) + "\n")
    for name, experiment in zip(names, experiments, strict=True):
        if process == 0:
            print(f"stage {name}", flush=True)
        code = train(experiment, args.workdir / name)
        if code:
            return _leave(code)
    return 0


def _dry_run(experiments: Mapping[str, Experiment], workdir: Path, process: int) -> int:
    """Check each stage, in its folder of the workdir. Exit code 0, or 2 if one needs more memory than there is."""
    from sr3_jax.planning.dry_run import dry_run

    fitting = True
    for name, experiment in experiments.items():
        text, fits = dry_run(experiment, workdir / name)
        fitting &= fits
        if process == 0:
            print(f"stage {name}\n{text}\n" if name else text, flush=True)
    return 0 if fitting else 2


def _leave(code: int) -> int:
    """The exit code, or the end of the process if a signal has stopped it: its device may still evaluate."""
    import jax

    from sr3_jax.distributed.processes import exit_now

    if code and jax.process_count() == 1:
        exit_now(code)
    return code
