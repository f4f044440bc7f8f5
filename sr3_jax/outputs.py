"""What an evaluation has finished: output pictures and their scores in a folder, found again by the next run.

A method's folder holds NAME.png for each picture (NAME.2.png for its second sample) and scores.jsonl, one line
an output. A line is believed only if it is of the same method, original and seed, and its picture is still
there, pixel by pixel.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.aliases import UserError
from sr3_jax.picture_errors import printable, reason
from sr3_jax.pictures import Picture, PictureError, read_rgb, write_picture

SCORES = "scores.jsonl"
Scores = dict[str, float]


def digest(value: np.ndarray | Mapping[str, Any]) -> str:
    """SHA-256, in hex, of an array with its shape and dtype, or of plain values as JSON."""
    if isinstance(value, np.ndarray):
        head = f"{value.dtype.str}{value.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_json(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for a file: JSON has no infinity, which is the PSNR of an exact output; None stands for it."""
    return {key: value if math.isfinite(value) else None for key, value in scores.items()}


def from_json(scores: Mapping[str, float | None]) -> Scores:
    """The inverse of `to_json`."""
    return {key: math.inf if value is None else value for key, value in scores.items()}


def file_name(name: str, taken: set[str]) -> str:
    """`name` as a file's name that is fit for any system and not yet in `taken`, to which it is added."""
    clean = re.sub(r"[^\w-]+", "_", name).strip("_")[:60] or "picture"  # 60 letters are at most 240 bytes
    result, number = clean, 2
    while result.lower() in taken:  # some file systems do not tell A from a
        result, number = f"{clean}_{number}", number + 1
    taken.add(result.lower())
    return result


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{printable(path)} {_sentence(error)}") from error


def open_folder(path: Path) -> Path:
    """The folder, made if need be, and proven to take files.

    Raises:
        UserError: it can't be made, or nothing can be written in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".sr3-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except FileExistsError as error:
        raise UserError(f"output {printable(path)} is a file: name a folder") from error
    except OSError as error:
        raise UserError(f"output {printable(path)} {_sentence(error)}") from error
    return path


class Outputs:
    """The outputs of one method in `folder`; `identity` is all that they depend on but picture and sample."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = digest(identity)
        self._known = _read_lines(folder / SCORES)

    def path(self, name: str, sample: int) -> Path:
        """Where the picture of a sample (0 the first) is or will be."""
        return self.folder / (f"{name}.png" if sample == 0 else f"{name}.{sample + 1}.png")

    def find(self, name: str, sample: int, original: str) -> Scores | None:
        """The scores of a finished output, None if there is none; `original` is the digest of its original."""
        line = self._known.get((self._identity, name, sample))
        if line is None or line["original"] != original:
            return None
        try:
            kept = digest(read_rgb(self.path(name, sample)))
        except PictureError:
            return None
        return from_json(line["scores"]) if kept == line["output"] else None

    def keep(self, name: str, sample: int, original: str, output: np.ndarray, scores: Scores) -> None:
        """Write an output uint8 [H,W,3] and its scores.

        Raises:
            UserError: they can't be written.
        """
        path, lines = self.path(name, sample), self.folder / SCORES
        line = {"identity": self._identity, "picture": name, "sample": sample, "original": original}
        line |= {"output": digest(output), "scores": to_json(scores)}
        self._known[self._identity, name, sample] = line
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_picture(path, Picture(output))
            with lines.open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                # A killed run may have left half a line, which must not swallow this one.
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(start + json.dumps(line).encode() + b"\n")
        except PictureError as error:
            raise UserError(f"{printable(path)} {error}") from error
        except OSError as error:
            raise UserError(f"{printable(lines)} {_sentence(error)}") from error


def _read_lines(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The last whole line of each output."""
    found = {}
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found[entry["identity"], entry["picture"], entry["sample"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _sentence(error: OSError) -> str:
    return f"cannot be written ({reason(error)}): name another folder with -o"
