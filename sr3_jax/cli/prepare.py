"""Make a TFDS data set from a folder of images, to be used as tfds:NAME:train.

Every image is decoded in full; unusable files are listed. Subfolders become classes, and folders
train, val and test become splits. Exit code 1 if files were skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from sr3_jax.cli._options import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=local_path, metavar="PATH", help="a folder of images; subfolders become classes"
    )
    parser.add_argument(
        "--name", required=True, help="name of the data set: lowercase letters, digits, underscores"
    )
    parser.add_argument(
        "--data-dir",
        type=local_path,
        metavar="DIR",
        help="where to write it (default: $SR3_DATA_DIR, or a folder in ~/.cache)",
    )
    test = parser.add_mutually_exclusive_group()
    test.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="fraction of the images for the split 'test'",
    )
    test.add_argument(
        "--test-count", type=int, default=0, metavar="N", help="number of images for the split 'test'"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set of this name")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 if files were skipped; UserError if no data set was written."""
    from sr3_jax.cli._progress import Bar, progress_bar
    from sr3_jax.data import store
    from sr3_jax.data.prepare import NothingPrepared, prepare
    from sr3_jax.errors import UserError
    from sr3_jax.image_io.errors import printable

    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test-fraction={args.test_fraction:g} must be at least 0 and below 1")
    if args.test_count < 0:
        raise UserError(f"--test-count={args.test_count} must be 0 or more")

    def report(rejected: list[tuple[Path, str]]) -> None:
        if rejected:
            print(f"skipped {len(rejected)} files:", file=sys.stderr)
            print("\n".join(f"  {printable(path)}: {reason}" for path, reason in rejected), file=sys.stderr)

    bars: list[Bar] = []  # made at the first image, so that errors come without a bar
    data_dir = Path(os.path.expanduser(args.data_dir)) if args.data_dir else store.data_dir()
    with contextlib.ExitStack() as stack:

        def advance(total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress_bar(total=total, unit="image")))
            bars[0].update()

        try:
            made = prepare(
                Path(args.path),
                name=args.name,
                data_dir=data_dir,
                test_count=args.test_count,
                test_fraction=args.test_fraction,
                overwrite=args.overwrite,
                progress=advance,
            )
        except NothingPrepared as error:
            report(error.rejected)
            raise
    classes = f", {len(made.labels)} classes" if made.labels else ""
    for split, count in made.examples.items():
        print(f"tfds:{args.name}:{split}  {count} images{classes}")
    print(f"in {printable(made.folder)}")
    if args.data_dir and str(data_dir) not in store.search_path():
        print(f"(set SR3_DATA_DIR={printable(data_dir)} to use it)")
    report(made.rejected)
    return 1 if made.rejected else 0
