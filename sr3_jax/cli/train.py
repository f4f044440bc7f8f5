"""Train a model: sr3 train --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE ...].

The config of a cascade trains its stages one after the other, each in DIR/STAGE; an override holds for all of them.
The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PASS_UNKNOWN = True  # --config.SECTION.FIELD=VALUE goes to experiment.load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two names that a run needs; running the same command again resumes it."""
    parser.add_argument("--config", required=True, help="a config file, such as configs/photos_4x.py")
    parser.add_argument("--workdir", required=True, type=Path, help="where the run keeps everything it makes")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when complete, 128 + the signal's number when one stopped it."""
    from sr3_jax.config.experiment import load_cascade, load_config, read
    from sr3_jax.distributed.processes import start_processes
    from sr3_jax.files import make_folder, write_text
    from sr3_jax.inference.stages import PLAN_FILE, check_chain, stage_from_config
    from sr3_jax.train.loop import train

    configs = load_cascade(args.config, args.rest)
    if not configs:
        experiment = read(load_config(args.config, args.rest))
        start_processes()
        return train(experiment, args.workdir)
    experiments = [read(config) for config in configs]  # all are checked before the first is trained
    names = [config["stage"]["name"] for config in configs]
    taken: set[str] = set()
    check_chain(
        [
            stage_from_config(config, name, name=name, taken=taken)
            for config, name in zip(configs, names, strict=True)
        ]
    )
    process, _ = start_processes()
    if process == 0:
        write_text(make_folder(args.workdir) / PLAN_FILE, json.dumps({"stages": names}) + "\n")
    for name, experiment in zip(names, experiments, strict=True):
        if process == 0:
            print(f"stage {name}", flush=True)
        code = train(experiment, args.workdir / name)
        if code:
            return code
    return 0
