#!/usr/bin/env python
"""Holds out whole photographs: copies a folder into OUT/train and cuts the held-out ones into OUT/tiles.

    python launch/split_photos.py FOLDER OUT                # 30 photographs held out, 8 tiles of 128x128 of each
    python launch/split_photos.py FOLDER OUT --hold-out 10 --tiles 4 --side 96

Which are held out follows from the SHA-256 of each file's name, so it is the same everywhere. A tile is area-resampled
from a square of twice its side, where the photograph has room: so compression leaves no trace in what is scored.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sr3_jax.aliases import UserError
from sr3_jax.data.sources import scan_folder
from sr3_jax.pictures import Picture, read_rgb, write_picture


def order(path: Path) -> str:
    """Where a photograph stands in the queue to be held out."""
    return hashlib.sha256(path.name.encode()).hexdigest()


def tiles(image: np.ndarray, count: int, side: int) -> list[np.ndarray]:
    """Up to `count` tiles uint8 [side,side,3], spread evenly over uint8 [H,W,3] without overlap."""
    shrink = 2 if min(image.shape[:2]) >= 4 * side else 1
    square = side * shrink
    rows, columns = (extent // square for extent in image.shape[:2])
    taken = [place * rows * columns // count for place in range(min(count, rows * columns))]
    cut = []
    for row, column in (divmod(place, columns) for place in dict.fromkeys(taken)):
        part = image[row * square : (row + 1) * square, column * square : (column + 1) * square]
        cut.append(np.asarray(Image.fromarray(part).resize((side, side), Image.Resampling.BOX)))
    return cut


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hold-out", type=int, default=30, help="photographs (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=8, help="of each, at most (default: %(default)s)")
    parser.add_argument("--side", type=int, default=128, help="of a tile, in pixels (default: %(default)s)")
    args = parser.parse_args()
    try:
        scan = scan_folder(args.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    large = [path for path, size in zip(scan.pictures, scan.sizes, strict=True) if min(size) >= args.side]
    queue = sorted(large, key=order)
    if len(queue) <= args.hold_out:
        print(
            f"{args.folder} has {len(queue)} photographs, too few to hold out {args.hold_out}",
            file=sys.stderr,
        )
        return 2
    for name in ("train", "tiles"):
        shutil.rmtree(args.out / name, ignore_errors=True)
        (args.out / name).mkdir(parents=True)
    for path in queue[args.hold_out :]:
        shutil.copy(path, args.out / "train" / path.name)
    count = 0
    for path in queue[: args.hold_out]:
        for number, tile in enumerate(tiles(read_rgb(path), args.tiles, args.side)):
            write_picture(args.out / "tiles" / f"{path.stem}-{number}.png", Picture(tile))
            count += 1
    print(
        f"{len(queue) - args.hold_out} photographs to train on, {count} tiles of {args.hold_out} others in {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
