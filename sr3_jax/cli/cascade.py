"""Generate images with a cascade: a base model, then super-resolution stages.

Writes OUT/00000.png and so on, contact sheets (grid.png, stages.png) and images.json. Run the same command again to
resume after the last finished stage. `--stages DIR` uses all stages of a cascade that was trained in one folder.
"""

from __future__ import annotations

import argparse

from sr3_jax.cli._generation import add_shared, generate_images
from sr3_jax.cli._options import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stages", nargs="+", required=True, metavar="STAGE",
        help="workdirs, .safetensors files or shipped names, the base model first; or the folder of a whole cascade",
    )  # fmt: skip
    parser.add_argument(
        "--low-res", nargs="+", type=local_path, metavar="IMAGE",
        help="start from these images (or folders of images) instead of a base model",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the images of all stages in OUT/stages")
    add_shared(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    return generate_images(args, args.stages, args.low_res, keep=args.keep)
