"""Make a TFDS data set from a folder of images, for tfds:NAME:train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a folder of images; subfolders become classes")
    parser.add_argument(
        "--name", required=True, help="name of the data set: small letters, digits, underscores"
    )
    parser.add_argument(
        "--data-dir", metavar="DIR", help="where data sets lie (else $SR3_DATA_DIR or ~/.cache)"
    )
    test = parser.add_mutually_exclusive_group()
    test.add_argument(
        "--test-fraction", type=float, default=0.0, metavar="F", help="share kept for split 'test'"
    )
    test.add_argument("--test-count", type=int, default=0, metavar="N", help="images kept for split 'test'")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of the same name")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 when files were left out; UserError when nothing could be done."""
    from tqdm import tqdm

    from sr3_jax.data import store
    from sr3_jax.data.folders import shown
    from sr3_jax.data.prepare import NothingPrepared, prepare
    from sr3_jax.errors import UserError

    if not 0 <= args.test_fraction < 1:
        raise UserError(f"--test-fraction={args.test_fraction:g} is no share: use one from 0 to under 1")
    if args.test_count < 0:
        raise UserError(f"--test-count={args.test_count} is negative: use 0 or more")

    def tell(rejected: list[tuple[Path, str]]) -> None:
        if rejected:  # on stderr, which prints any name
            print(f"{len(rejected)} left out:", file=sys.stderr)
            print("\n".join(f"  {shown(path)}: {reason}" for path, reason in rejected), file=sys.stderr)

    data_dir = Path(args.data_dir).expanduser() if args.data_dir else store.data_dir()
    bars: list[tqdm] = []  # none before there is something to do

    def advance(total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=args.name, unit=" images"))
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
        tell(error.rejected)
        raise
    finally:
        for bar in bars:
            bar.close()
    classes = f", {len(made.labels)} classes" if made.labels else ""
    for split, count in made.examples.items():
        print(f"tfds:{args.name}:{split}  {count} images{classes}")
    print(f"in {shown(made.folder)}")
    if args.data_dir and str(data_dir) not in store.search_path():
        print(f"(set SR3_DATA_DIR={shown(data_dir)} to use it)")
    tell(made.rejected)
    return 1 if made.rejected else 0
