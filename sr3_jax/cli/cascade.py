"""Draw images by a cascade of stages: a base stage, then super-resolution stages, each trained on its own.

OUT gets 00000.png and on, a page of them (grid.png, stages.png) and images.json. The same command again goes on
after the last finished stage. `--stages DIR` names all stages of a cascade that was trained in one folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sr3_jax.cli._generation import add_shared, draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stages", nargs="+", required=True, metavar="STAGE",
        help="workdirs, exported .safetensors files or shipped names, the base first; or the one folder of all",
    )  # fmt: skip
    parser.add_argument(
        "--low-res", nargs="+", type=Path, metavar="IMAGE",
        help="start from these images (or folders of them) in place of a base stage",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the images of all stages, in OUT/stages")
    add_shared(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    return draw(args, args.stages, args.low_res, keep=args.keep)
