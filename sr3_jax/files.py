"""Atomic and append-only writes, output folders, portable file names, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason


def sha256_hex(value: np.ndarray | Mapping[str, Any]) -> str:
    """SHA-256 in hex of an array (with its shape and dtype) or of JSON values."""
    if isinstance(value, np.ndarray):
        head = f"{value.dtype.str}{value.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_json(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON, which has no infinity (the PSNR of an exact output): None stands for it."""
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}


def from_json(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The inverse of `to_json`."""
    return {key: math.inf if value is None else value for key, value in scores.items()}


def unique_file_name(name: str, taken: set[str]) -> str:
    """`name` as a portable file name that is not in `taken`, to which it is added."""
    clean = re.sub(r"[^\w-]+", "_", name).strip("_")[:60] or "image"  # 60 characters are at most 240 bytes
    result, number = clean, 2
    while result.lower() in taken:  # some file systems ignore case
        result, number = f"{clean}_{number}", number + 1
    taken.add(result.lower())
    return result


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` on success."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{printable(path)} {sentence(error)}") from error


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file, each as one line, in a single write; the file's folder must exist.

    An incomplete last line, which a killed process may have left, is terminated first; `read_jsonl` skips it.

    Raises:
        OSError: the file cannot be written.
    """
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    with path.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(start + lines)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without incomplete or damaged lines; none if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def make_folder(path: Path) -> Path:
    """Create a folder if it does not exist, and check that files can be written in it.

    Raises:
        UserError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".sr3-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # a process on another host may have the same id
    except FileExistsError as error:
        raise UserError(f"output {printable(path)} is a file: give a folder") from error
    except OSError as error:
        raise UserError(f"output {printable(path)} {sentence(error)}") from error
    return path


def sentence(error: OSError) -> str:
    """The error text that follows the name of a file that cannot be written."""
    return f"cannot be written ({reason(error)}): give another folder with -o"
