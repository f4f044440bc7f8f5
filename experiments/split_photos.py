#!/usr/bin/env python
"""Holds out whole photographs: copies a folder into OUT/train and cuts the held-out ones into OUT/tiles.

    python launch/split_photos.py FOLDER OUT                # 30 photographs held out, 8 tiles of 128x128 of each
    python launch/split_photos.py FOLDER OUT --hold-out 10 --tiles 4 --side 96

Which are held out follows from the SHA-256 of each file's name, so it is the same everywhere. A held-out photograph is
area-resampled to half its size, where it has room: so compression leaves no trace in what is scored.

For recognition each held-out photograph is a class: of its squares of half a tile's side those on the black fields of
a chessboard are in OUT/gallery/NAME, to train a classifier on, those on the white fields in OUT/probe/NAME, to ask it
about: up to 40 of each, spread evenly.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sr3_jax.data.sources import scan_folder
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image

FIELDS = ("gallery", "probe")  # black and white
PATCHES = 40  # of a photograph in each
# Letters of a held-out one's name: with a dash and two digits 60, where an evaluation cuts names.
LONGEST = 57


def order(path: Path) -> str:
    """Where a photograph stands in the queue to be held out."""
    return hashlib.sha256(path.name.encode()).hexdigest()


def shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H,W,3] at half its size, by areas, where that leaves room for two tiles a side; else as it is."""
    height, width = (extent // 2 for extent in image.shape[:2])
    if min(height, width) < 2 * side:
        return image
    even = Image.fromarray(image[: 2 * height, : 2 * width])
    return np.asarray(even.resize((width, height), Image.Resampling.BOX))


def squares(image: np.ndarray, side: int) -> list[tuple[int, np.ndarray]]:
    """Those that tile uint8 [H,W,3] from the top left, row by row: (colour of its field, uint8 [side,side,3])."""
    rows, columns = (extent // side for extent in image.shape[:2])
    return [
        ((row + column) % 2, image[row * side : (row + 1) * side, column * side : (column + 1) * side])
        for row in range(rows)
        for column in range(columns)
    ]


def named(paths: list[Path]) -> list[list[Path]]:
    """For each path those that have its name, but for what file names may not have, itself first."""
    names = [re.sub(r"[^\w-]+", "_", path.stem).lower() for path in paths]
    of: dict[str, list[Path]] = {}
    for path, name in zip(paths, names, strict=True):
        of.setdefault(name, []).append(path)
    return [
        [path, *(other for other in of[name] if other != path)]
        for path, name in zip(paths, names, strict=True)
    ]


def spread(found: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Up to `count` of them, evenly."""
    return [found[place * len(found) // count] for place in range(count)] if len(found) > count else found


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
    large = [path for path, size in zip(scan.images, scan.sizes, strict=True) if min(size) >= args.side]
    queue = sorted(large, key=order)
    if len(queue) <= args.hold_out:
        print(
            f"{args.folder} has {len(queue)} photographs, too few to hold out {args.hold_out}",
            file=sys.stderr,
        )
        return 2
    for place, (path, of) in enumerate(zip(queue, named(queue), strict=True)):
        if len(of) > 1 or (place < args.hold_out and len(path.stem) > LONGEST):
            others = f"as {of[1]} is" if len(of) > 1 else f"with over {LONGEST} letters"
            print(
                f"{path} is named {others}, and its tiles could not be told apart: rename it", file=sys.stderr
            )
            return 2
    for name in ("train", "tiles", *FIELDS):
        shutil.rmtree(args.out / name, ignore_errors=True)
    for name in ("train", "tiles"):
        (args.out / name).mkdir(parents=True)
    for path in queue[args.hold_out :]:
        shutil.copy(path, args.out / "train" / path.name)
    count = 0
    for path in queue[: args.hold_out]:
        image = shrunk(read_rgb(path), args.side)
        for number, tile in enumerate(spread([one for _, one in squares(image, args.side)], args.tiles)):
            write_image(args.out / "tiles" / f"{path.stem}-{number}.png", DecodedImage(tile))
            count += 1
        fields = squares(image, args.side // 2)
        for colour, name in enumerate(FIELDS):
            (args.out / name / path.stem).mkdir(parents=True)
            for number, patch in enumerate(spread([one for of, one in fields if of == colour], PATCHES)):
                write_image(args.out / name / path.stem / f"{path.stem}-{number}.png", DecodedImage(patch))
    print(
        f"{len(queue) - args.hold_out} photographs to train on, {count} tiles of {args.hold_out} others in {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
