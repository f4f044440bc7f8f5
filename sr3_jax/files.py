"""Files written whole or not at all, folders that take files, names fit for any system, and digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason


def sha256_hex(value: np.ndarray | Mapping[str, Any]) -> str:
    """SHA-256, in hex, of an array with its shape and dtype, or of plain values as JSON."""
    if isinstance(value, np.ndarray):
        head = f"{value.dtype.str}{value.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_json(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for a file: JSON has no infinity, which is the PSNR of an exact output; None stands for it."""
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}


def from_json(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The inverse of `to_json`."""
    return {key: math.inf if value is None else value for key, value in scores.items()}


def unique_file_name(name: str, taken: set[str]) -> str:
    """`name` as a file's name that is fit for any system and not yet in `taken`, to which it is added."""
    clean = re.sub(r"[^\w-]+", "_", name).strip("_")[:60] or "image"  # 60 letters are at most 240 bytes
    result, number = clean, 2
    while result.lower() in taken:  # some file systems do not tell A from a
        result, number = f"{clean}_{number}", number + 1
    taken.add(result.lower())
    return result


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path`, of its own, for a file that takes its place at the end: whole, or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{printable(path)} {sentence(error)}") from error


def make_folder(path: Path) -> Path:
    """The folder, made if need be, and proven to take files.

    Raises:
        UserError: it can't be made, or nothing can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".sr3-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another host's process may have the same number
    except FileExistsError as error:
        raise UserError(f"output {printable(path)} is a file: name a folder") from error
    except OSError as error:
        raise UserError(f"output {printable(path)} {sentence(error)}") from error
    return path


def sentence(error: OSError) -> str:
    """What follows the name of a file that cannot be written."""
    return f"cannot be written ({reason(error)}): name another folder with -o"
