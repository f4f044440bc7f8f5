#!/usr/bin/env python
"""Splits a folder of photographs: training photographs to OUT/train, tiles of the held-out ones to OUT/tiles.

    python experiments/split_photos.py FOLDER OUT                # hold out 30 photographs, 8 tiles of 128x128 each
    python experiments/split_photos.py FOLDER OUT --hold-out 10 --tiles 4 --side 96

The SHA-256 of the file names decides which photographs are held out, so the split is the same everywhere. Held-out
photographs are downscaled by 2 (area) where they are large enough, so that compression artifacts do not affect scores.

For recognition, each held-out photograph is a class. Its squares of half a tile's side are divided like a chessboard:
black ones go to OUT/gallery/NAME to train a classifier, white ones to OUT/probe/NAME to test it, up to 40 each.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sr3_jax.data.sources import scan_folder
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image

FIELDS = ("gallery", "probe")  # black and white squares
PATCHES = 40  # per photograph and field
# With a dash and two digits, a tile's name has at most 60 characters; an evaluation truncates longer ones.
LONGEST = 57


def order(path: Path) -> str:
    """The sort key of a photograph; the first ones are held out."""
    return hashlib.sha256(path.name.encode()).hexdigest()


def downscaled(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H,W,3] at half its size (area), if that leaves two tiles per side; otherwise unchanged."""
    height, width = (extent // 2 for extent in image.shape[:2])
    if min(height, width) < 2 * side:
        return image
    even = Image.fromarray(image[: 2 * height, : 2 * width])
    return np.asarray(even.resize((width, height), Image.Resampling.BOX))


def squares(image: np.ndarray, side: int) -> list[tuple[int, np.ndarray]]:
    """The squares of uint8 [H,W,3] in row order: (0 black or 1 white, uint8 [side,side,3])."""
    rows, columns = (extent // side for extent in image.shape[:2])
    return [
        ((row + column) % 2, image[row * side : (row + 1) * side, column * side : (column + 1) * side])
        for row in range(rows)
        for column in range(columns)
    ]


def same_name(paths: list[Path]) -> list[list[Path]]:
    """For each path, itself and the other paths whose sanitized names are the same."""
    names = [re.sub(r"[^\w-]+", "_", path.stem).lower() for path in paths]
    of: dict[str, list[Path]] = {}
    for path, name in zip(paths, names, strict=True):
        of.setdefault(name, []).append(path)
    return [
        [path, *(other for other in of[name] if other != path)]
        for path, name in zip(paths, names, strict=True)
    ]


def spread(found: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Up to `count` of them, evenly spaced."""
    return [found[place * len(found) // count] for place in range(count)] if len(found) > count else found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--hold-out", type=int, default=30, help="number of held-out photographs (default: %(default)s)"
    )
    parser.add_argument(
        "--tiles", type=int, default=8, help="tiles per photograph, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--side", type=int, default=128, help="side of a tile in pixels (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        scan = scan_folder(args.folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    large = [path for path, size in zip(scan.images, scan.sizes, strict=True) if min(size) >= args.side]
    queue = sorted(large, key=order)
    if len(queue) <= args.hold_out:
        print(
            f"--hold-out {args.hold_out}: {args.folder} has {len(queue)} photographs of at least {args.side} pixels",
            file=sys.stderr,
        )
        return 2
    for place, (path, of) in enumerate(zip(queue, same_name(queue), strict=True)):
        if len(of) > 1 or (place < args.hold_out and len(path.stem) > LONGEST):
            reason = (
                f"has the same name as {of[1]}" if len(of) > 1 else f"has a name of over {LONGEST} letters"
            )
            print(f"{path} {reason}, so the names of its tiles would collide: rename it", file=sys.stderr)
            return 2
    for name in ("train", "tiles", *FIELDS):
        shutil.rmtree(args.out / name, ignore_errors=True)
    for name in ("train", "tiles"):
        (args.out / name).mkdir(parents=True)
    for path in queue[args.hold_out :]:
        shutil.copy(path, args.out / "train" / path.name)
    count = 0
    for path in queue[: args.hold_out]:
        image = downscaled(read_rgb(path), args.side)
        for number, tile in enumerate(spread([one for _, one in squares(image, args.side)], args.tiles)):
            write_image(args.out / "tiles" / f"{path.stem}-{number}.png", DecodedImage(tile))
            count += 1
        fields = squares(image, args.side // 2)
        for color, name in enumerate(FIELDS):
            (args.out / name / path.stem).mkdir(parents=True)
            for number, patch in enumerate(spread([one for of, one in fields if of == color], PATCHES)):
                write_image(args.out / name / path.stem / f"{path.stem}-{number}.png", DecodedImage(patch))
    print(
        f"{args.out}: {len(queue) - args.hold_out} training photographs, {count} tiles of {args.hold_out} held-out ones"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
