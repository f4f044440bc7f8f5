"""Folders of files: walked in a fixed order, and named so that any name can be printed."""

from __future__ import annotations

import os
from pathlib import Path

from sr3_jax.errors import UserError


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path as one line that can always be printed: \xNN for bytes that are not UTF-8, \n for newlines."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def sort_key(path: str | os.PathLike[str]) -> bytes:
    """Orders paths by their bytes, which is the same on every machine and works for every name."""
    return os.fsencode(path)


def walk(root: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Every file under `root` in the order of `sort_key`; and (folder, reason) where one can't be listed.

    Hidden files and folders are passed over; links to folders are followed.

    Raises:
      UserError: `root` is no folder, or can't be listed.
    """
    if not root.is_dir():
        raise UserError(f"'{shown(root)}' is not a folder: name one that holds images")
    files: list[Path] = []
    refused: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()  # a link back up the tree must not be followed for ever

    def refuse(error: OSError) -> None:
        if Path(error.filename) == root:
            raise UserError(
                f"the folder '{shown(root)}' can't be listed ({error.strerror}): mend its permissions"
            )
        refused.append((Path(error.filename), f"folder can't be listed ({error.strerror})"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files, key=sort_key), refused
