"""The cache of an evaluation: the outputs of one method as image files, with their metrics as JSON lines.

The folder of a method holds NAME.png for each image (NAME.2.png for its second sample) and scores.jsonl, with a line
for each output. Several processes may work in one folder: each appends to its own file, and all files are read.
An output is only reused if its method, ground truth and seed are the same and its image file is unchanged.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.files import append_jsonl, from_json, read_jsonl, sentence, sha256_hex, to_json
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image

LINES = "scores"  # the stem of the files of JSON lines


@dataclass(frozen=True)
class Output:
    """A finished output: one line of the cache.

    Attributes:
        image: the name of its image.
        sample: 0 for the first; -S for metrics of all S samples together, which have no image file.
        ground_truth: hash of the ground truth, and of the label if the output depends on it.
        pixels: hash of the output's pixels.
        file: SHA-256 of its image file; None if it has none.
        seconds: the time to sample it; None if it was not timed.
        metrics: {key of the ImageMetrics or SampleMetrics: {metric: value}}.
    """

    image: str
    sample: int
    ground_truth: str
    pixels: str
    file: str | None = None
    seconds: float | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class OutputCache:
    """The outputs of one method in `folder`.

    Args:
        settings: plain values that all outputs depend on, such as weights, sampler and seed.
        process: the index of this process.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, process: int = 0) -> None:
        self.folder = folder
        self._lines = folder / (f"{LINES}.jsonl" if process == 0 else f"{LINES}.{process}.jsonl")
        self._method = sha256_hex(settings)
        # By image, sample and ground truth; of different pixels (of other processes) the latest is last.
        self._outputs: dict[tuple[str, int, str], dict[str, Output]] = {}
        for path in sorted(folder.glob(f"{LINES}*.jsonl")):
            self._read_lines(path)

    def path(self, image: str, sample: int) -> Path:
        """The image file of a sample (0 is the first)."""
        return output_path(self.folder, image, sample)

    def read(self, image: str, sample: int) -> np.ndarray:
        """The pixels of a cached sample, uint8 [H,W,3]."""
        return read_rgb(self.path(image, sample))

    def find(self, image: str, sample: int, ground_truth: str, *, pixels: str | None = None) -> Output | None:
        """The cached output, or None.

        Args:
            ground_truth: as in `Output`.
            pixels: hash of the output, if it is known.
        """
        found = self._outputs.get((image, sample, ground_truth), {})
        for output in reversed(found.values()):
            if pixels not in (None, output.pixels):
                continue
            # Hashing the file is much faster than decoding it.
            if output.file is None or output.file == _file_hash(self.path(image, sample)):
                return output
        return None

    def add(
        self,
        outputs: Sequence[Output],
        images: Sequence[np.ndarray | None],
        *,
        map: Callable[..., Iterable[str | None]] = builtins.map,
    ) -> None:
        """Write outputs.

        Args:
            images: the pixels uint8 [H,W,3] of each output; None if its file exists, or none is wanted.
            map: `map` of a thread pool, which writes several image files at once.

        Raises:
            UserError: they cannot be written.
        """
        lines = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for output, file in zip(outputs, map(self._write, outputs, images), strict=True):
                output = replace(output, file=file or output.file)
                self._learn(output)
                line = {"method": self._method, "image": output.image, "sample": output.sample}
                line |= {"ground_truth": output.ground_truth, "output": output.pixels, "file": output.file}
                line |= {"seconds": output.seconds}
                line |= {"metrics": {key: to_json(values) for key, values in output.metrics.items()}}
                lines.append(line)
            append_jsonl(self._lines, lines)
        except OSError as error:
            raise UserError(f"{printable(self._lines)} {sentence(error)}") from error

    def _write(self, output: Output, image: np.ndarray | None) -> str | None:
        if image is None:
            return None
        path = self.path(output.image, output.sample)
        try:
            write_image(path, DecodedImage(image), durable=False)  # `find` checks the file
        except ImageError as error:
            raise UserError(f"{printable(path)} {error}") from error
        return _file_hash(path)

    def _learn(self, output: Output) -> None:
        """Add an output to the index. Metrics of one output accumulate, whatever lines and files they are in."""
        found = self._outputs.setdefault((output.image, output.sample, output.ground_truth), {})
        before = found.pop(output.pixels, None)
        metrics = {**(before.metrics if before else {}), **output.metrics}
        found[output.pixels] = replace(output, metrics=metrics)

    def _read_lines(self, path: Path) -> None:
        for line in read_jsonl(path):
            try:
                if line["method"] == self._method:
                    metrics = {key: from_json(values) for key, values in line["metrics"].items()}
                    place = (line["image"], line["sample"], line["ground_truth"])
                    self._learn(Output(*place, line["output"], line["file"], line["seconds"], metrics))
            except (KeyError, TypeError, AttributeError):
                continue


def output_path(folder: Path, image: str, sample: int) -> Path:
    """The image file of a sample (0 is the first) in the folder of a method."""
    return folder / (f"{image}.png" if sample == 0 else f"{image}.{sample + 1}.png")


def _file_hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
