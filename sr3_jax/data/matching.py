"""Match image files of two folders by name: low-res and high-res images, or ground truth and a program's outputs.

Two files match if their paths below their folders are equal apart from the extension. Files without such a match are
compared again without their suffix: a usual one (`_SUFFIX`), or one that all files of the folder share.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable

_LISTED = 3  # files that a message names
_LOW_RES = re.compile(r"[_-]lr(?:x?\d+)?$", re.IGNORECASE)
# _LR, _LR4, _LRx4, _HR, _GT, _SR, _out and so on, also with a hyphen; x4, _x4, _4x
_SUFFIX = re.compile(r"[_-](?:lr|hr|gt|sr|out)(?:x?\d+)?$|[_-]?x\d+$|[_-]\d+x$", re.IGNORECASE)


def match_files(wanted: Sequence[str], files: Sequence[str], *, where: str) -> list[int | None]:
    """The index in `files` of the file that matches each of `wanted`; None where there is none.

    Args:
        wanted, files: paths relative to their folders.
        where: the folder of `files`, for errors.

    Raises:
        UserError: several files match one of `wanted`, or the other way round.
    """
    result: list[int | None] = [None] * len(wanted)
    for keys in (_stems, _short_stems):
        # A file that matches exactly takes no part in the second comparison.
        matched = set(result)
        by_key = defaultdict(list)
        for index, key in enumerate(keys(files)):
            if index not in matched:
                by_key[key].append(index)
        for place, key in enumerate(keys(wanted)):
            if result[place] is not None or not by_key[key]:
                continue
            if len(by_key[key]) > 1:
                several = named([files[index] for index in by_key[key]])
                raise UserError(
                    f"{several} in {printable(where)} match '{printable(wanted[place])}': keep only one of them there"
                )
            result[place] = by_key[key][0]
    for used, count in Counter(index for index in result if index is not None).items():
        if count > 1:
            several = named([name for name, index in zip(wanted, result, strict=True) if index == used])
            raise UserError(
                f"'{printable(files[used])}' in {printable(where)} matches {several}: "
                "use names that differ in more than a suffix"
            )
    return result


def is_low_res(path: str) -> bool:
    """Whether the name ends in the suffix of a low-res image, for folders with both images of each pair."""
    return _LOW_RES.search(os.path.splitext(path)[0]) is not None


def named(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    shown = ", ".join(f"'{printable(name)}'" for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more" if len(names) > _LISTED else shown


def _stems(paths: Sequence[str]) -> list[str]:
    return [os.path.splitext(path)[0] for path in paths]


def _short_stems(paths: Sequence[str]) -> list[str]:
    """Stems without their suffix."""
    stems = _stems(paths)
    if len(stems) < 2 or any(_SUFFIX.search(stem) for stem in stems):
        return [_SUFFIX.sub("", stem) for stem in stems]
    least = min(stems, key=len)
    endings = (least[start:] for start in range(len(least)) if least[start] in "_-")
    shared = next((ending for ending in endings if all(stem.endswith(ending) for stem in stems)), "")
    return [stem.removesuffix(shared) for stem in stems]
