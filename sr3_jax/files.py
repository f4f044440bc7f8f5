"""Text and JSON-lines files, output folders and their locks, portable file names, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.storage import SCRATCH_PREFIX, atomic_write, check_bucket, is_url, try_lock

LOCK_FILE = ".lock"
_LARGEST_JSON = 16 * 2**20  # characters; most of our own files have kilobytes
_DEEPEST_JSON = 50  # levels; our own files have at most 10


class FolderInUse(UserError):
    """Another process works in a folder."""


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


def parse_json(text: str | bytes, *, most: int = _LARGEST_JSON) -> Any:
    """The values of a JSON text from outside: a file, whoever wrote it, or another process.

    Args:
        most: characters that are accepted.

    Raises:
        ValueError: it is not JSON, or is too large or too deeply nested for code that is recursive, such as repr.
    """
    if len(text) > most:
        raise ValueError(f"JSON of {len(text)} characters is too large")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST_JSON):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise ValueError("JSON is nested too deeply")
    return value


def read_json(path: Path, *, most: int = _LARGEST_JSON) -> Any:
    """The values of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`; or the text is not UTF-8.
    """
    with path.open("rb") as file:
        return parse_json(file.read(most + 1).decode("utf-8"), most=most)


def unique_file_name(name: str, taken: set[str]) -> str:
    """`name` as a portable file name that is not in `taken`, to which it is added."""
    clean = re.sub(r"[^\w-]+", "_", name).strip("_")[:60] or "image"  # 60 characters are at most 240 bytes
    result, number = clean, 2
    while result.lower() in taken:  # some file systems ignore case
        result, number = f"{clean}_{number}", number + 1
    taken.add(result.lower())
    return result


def safetensors_bytes(arrays: dict[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; equal inputs give equal bytes.

    The library orders tensors but writes the metadata in random order.
    """
    data = save(arrays, dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[start:]


def write_text(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{printable(path)} {sentence(error)}") from error


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file, each as one line, in a single write; the file's folder must exist.

    An incomplete last line, which a killed process may have left, is terminated first; `read_jsonl` skips it.

    Raises:
        OSError: the file cannot be written.
    """
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if is_url(path):  # objects cannot be appended to
        before = path.read_bytes() if path.exists() else b""
        with atomic_write(path) as whole:
            whole.write(before + (b"" if before[-1:] in (b"", b"\n") else b"\n") + lines)
        return
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
            row = parse_json(line)
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
        if is_url(path):
            check_bucket(path)
            return path
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{SCRATCH_PREFIX}{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # a process on another host may have the same id
    except FileExistsError as error:
        raise UserError(f"output {printable(path)} is a file: give a folder") from error
    except OSError as error:
        raise UserError(f"output {printable(path)} {sentence(error)}") from error
    return path


@contextlib.contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes that call this for the same folder out, until the context or the process ends.

    On a file system without locks, and in a bucket, there is no protection.

    Args:
        folder: it must exist and be writable.
        what: such as "workdir", for the error.

    Raises:
        FolderInUse: another process has it; the error names that process. Its exit code is 1 if that process was on
            another machine: if the machine died, its lock goes away after a while.
    """
    if is_url(folder):
        yield
        return
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    with (folder / LOCK_FILE).open("a+") as file:
        if try_lock(file) is False:
            file.seek(0)
            try:
                holder = parse_json(file.read(1000))
                who = f"process {int(holder['pid'])} on {printable(holder['host'])}"
            except (ValueError, KeyError, TypeError):
                holder, who = me, "another process"
            error = FolderInUse(
                f"{what} {printable(folder)} is in use by {who}: wait for it, stop it, or use another one"
            )
            error.exit_code = 2 if holder["host"] == me["host"] else 1
            raise error
        file.truncate(0)
        file.write(json.dumps(me) + "\n")
        file.flush()
        yield


def sentence(error: OSError) -> str:
    """The error text that follows the name of a file that cannot be written."""
    return f"cannot be written ({reason(error)}): make it writable, or give another folder"
