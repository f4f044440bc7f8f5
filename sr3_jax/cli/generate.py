"""Generate images from noise with an unconditional or class-conditional base model.

Writes OUT/00000.png and so on, a contact sheet (grid.png) and images.json.
"""

from __future__ import annotations

import argparse

from sr3_jax.cli._generation import add_shared, generate_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_NAME",
        help="a workdir, a .safetensors file or a shipped name",
    )
    add_shared(parser)


def run(args: argparse.Namespace) -> int:
    """Generate as a cascade of one stage; exit code 0."""
    return generate_images(args, [args.model], None, keep=False)
