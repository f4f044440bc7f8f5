"""What an evaluation has finished: output images and their scores in a folder, found again by the next run.

A method's folder holds NAME.png for each image (NAME.2.png for its second sample) and scores.jsonl, with lines
that say what was measured of an output; of several processes each has a file of lines of its own, so that they never
interleave, and all are read. A line is believed only if it is of the same method, original and seed, and its image
is still there, byte by byte.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.files import from_json, sentence, sha256_hex, to_json
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image

SCORES = "scores"
Scores = dict[str, float]


@dataclass(frozen=True)
class Kept:
    """What is known of a finished output without opening its image.

    Attributes:
        output: digest of its pixels.
        file: SHA-256 of its image file; None where the output is kept without one.
        seconds: what it took to make; None if nothing was timed.
        measures: {key of a measure: its scores}.
    """

    output: str
    file: str | None
    seconds: float | None
    measures: Mapping[str, Scores]


@dataclass(frozen=True, eq=False)
class Record:
    """An output to keep; `image` uint8 [H,W,3] is None where its image is there already, or none is wanted."""

    name: str
    sample: int
    original: str
    image: np.ndarray | None
    kept: Kept


class Outputs:
    """The outputs of one method in `folder`; `identity` is all that they depend on but image and sample.

    Several processes may work in one folder, each on images of its own: `process` is the number of this one.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, process: int = 0) -> None:
        self.folder = folder
        self._lines = folder / (f"{SCORES}.jsonl" if process == 0 else f"{SCORES}.{process}.jsonl")
        self._identity = sha256_hex(identity)
        self._known: dict[tuple[str, str, int, str], dict[str, Kept]] = {}
        for path in sorted(folder.glob(f"{SCORES}*.jsonl")):
            self._learn(path)

    def path(self, name: str, sample: int) -> Path:
        """Where the image of a sample (0 the first) is or will be."""
        return self.folder / (f"{name}.png" if sample == 0 else f"{name}.{sample + 1}.png")

    def read(self, name: str, sample: int) -> np.ndarray:
        """The image of a sample that `find` has found, uint8 [H,W,3]."""
        return read_rgb(self.path(name, sample))

    def find(self, name: str, sample: int, original: str, *, output: str | None = None) -> Kept | None:
        """What is known of a finished output, None if there is none.

        Args:
            original: digest of its original.
            output: its own digest, where that is known.
        """
        known = self._known.get((self._identity, name, sample, original), {})
        for kept in reversed(known.values()):
            if output not in (None, kept.output):
                continue
            # The file's bytes stand for its pixels: to hash them is much faster than to decode them.
            if kept.file is None or kept.file == _file_digest(self.path(name, sample)):
                return kept
        return None

    def keep(
        self, records: Sequence[Record], *, map: Callable[..., Iterable[str | None]] = builtins.map
    ) -> None:
        """Write outputs and what is known of them; `map` may be that of a pool of threads.

        Raises:
            UserError: they can't be written.
        """
        lines = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for record, file in zip(records, map(self._write, records), strict=True):
                kept = record.kept if record.image is None else replace(record.kept, file=file)
                self._add((self._identity, record.name, record.sample, record.original), kept)
                line = {"identity": self._identity, "image": record.name, "sample": record.sample}
                line |= {"original": record.original, "output": kept.output, "file": kept.file}
                line |= {"seconds": kept.seconds}
                line |= {"measures": {key: to_json(scores) for key, scores in kept.measures.items()}}
                lines.append(json.dumps(line).encode() + b"\n")
            with self._lines.open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                # A killed run may have left half a line, which must not swallow this one.
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"
                file.write(start + b"".join(lines))
        except OSError as error:
            raise UserError(f"{printable(self._lines)} {sentence(error)}") from error

    def _write(self, record: Record) -> str | None:
        if record.image is None:
            return None
        path = self.path(record.name, record.sample)
        try:
            write_image(path, DecodedImage(record.image), durable=False)  # `find` checks it
        except ImageError as error:
            raise UserError(f"{printable(path)} {error}") from error
        return _file_digest(path)

    def _add(self, key: tuple[str, str, int, str], kept: Kept) -> None:
        """The measures of one output add up, in whatever order and files they stand."""
        of = self._known.setdefault(key, {})
        before = of.pop(kept.output, None)
        measures = {**(before.measures if before else {}), **kept.measures}
        of[kept.output] = replace(kept, measures=measures)

    def _learn(self, path: Path) -> None:
        """Take in the whole lines of a file."""
        try:
            text = path.read_bytes()
        except OSError:
            return
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                measures = {key: from_json(scores) for key, scores in entry["measures"].items()}
                kept = Kept(entry["output"], entry["file"], entry["seconds"], measures)
                self._add((entry["identity"], entry["image"], entry["sample"], entry["original"]), kept)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue


def _file_digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
