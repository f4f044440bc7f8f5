"""Train a model: sr3 train --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE ...]."""

from __future__ import annotations

import argparse
from pathlib import Path

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to experiment.load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two names that a run needs; running the same command again resumes it."""
    parser.add_argument("--config", required=True, help="a config file, such as configs/photos_4x.py")
    parser.add_argument("--workdir", required=True, type=Path, help="where the run keeps everything it makes")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when complete, 128 + the signal's number when one stopped it."""
    from sr3_jax.experiment import load_config, read
    from sr3_jax.processes import start_processes
    from sr3_jax.train.loop import train

    start_processes()
    return train(read(load_config(args.config, args.rest)), args.workdir)
