"""Draw images of noise by a base stage: a model that was trained without low-res images.

OUT gets 00000.png and on, a page of them (grid.png) and images.json.
"""

from __future__ import annotations

import argparse

from sr3_jax.cli._generation import add_shared, draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_NAME", help="a workdir, an exported file or a shipped name"
    )
    add_shared(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0. A cascade of one stage."""
    return draw(args, [args.model], None, keep=False)
