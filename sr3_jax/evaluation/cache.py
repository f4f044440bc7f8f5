"""What an evaluation has on disk: outputs with their metrics, results of each process, and features of images.

Each process appends to its own files and reads those of all. Shape legend: N images, F features of an image.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features.statistics import FeatureProtocol
from sr3_jax.files import (
    append_jsonl,
    from_json,
    read_json,
    read_jsonl,
    sentence,
    sha256_hex,
    to_json,
    write_text,
)
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import DecodedImage, ImageError, write_image
from sr3_jax.storage import atomic_write, is_url, read_object

LINES = "scores"  # the stem of the files of JSON lines
_THREADS = 4  # that write image files


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
            if output.file is None or output.file == file_hash(output_path(self.folder, image, sample)):
                return output
        return None

    def add(self, outputs: Sequence[Output], images: Sequence[np.ndarray | None]) -> None:
        """Write outputs and the pixels uint8 [H,W,3] of each; None if its file exists, or none is wanted.

        Raises:
            UserError: they cannot be written.
        """
        lines = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(_THREADS, "write") as pool:
                files = list(pool.map(self._write, outputs, images))
            for output, file in zip(outputs, files, strict=True):
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
        path = output_path(self.folder, output.image, output.sample)
        try:
            write_image(path, DecodedImage(image), durable=False)  # `find` checks the file
        except ImageError as error:
            raise UserError(f"{printable(path)} {error}") from error
        return file_hash(path)

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


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(read_object(path) if is_url(path) else path.read_bytes()).hexdigest()
    except OSError:
        return None


# ---- The results of a process


@dataclass(frozen=True)
class Result:
    """One method on one image, as plain values.

    Attributes:
        metrics: {metric: one value per sample, or one for all samples together}.
        output_features, ground_truth_features: keys of the features of the first output and of the ground truth: one,
            or one per patch.
        reused: how many outputs came from the cache.
    """

    metrics: Mapping[str, Sequence[float]]
    output_features: Sequence[str]
    ground_truth_features: Sequence[str]
    reused: int


@dataclass(frozen=True)
class EvaluatedImage:
    """An image of the data set: its index, its name in files, its size in pixels, and one result for each method."""

    index: int
    name: str
    height: int
    width: int
    results: Sequence[Result] = ()


@dataclass(frozen=True)
class Part:
    """The results of one process, or of all: the images, and (index, reason) of those that cannot be read."""

    images: Sequence[EvaluatedImage]
    failed: Sequence[tuple[int, str]] = ()

    def write(self, folder: Path, process: int) -> None:
        """Write it to a file that `read` understands. UserError if it cannot be written."""
        write_text(_part_path(folder, process), json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path, process: int) -> Part:
        """Read the results that `write` wrote."""
        values: dict[str, Any] = read_json(_part_path(folder, process), most=2**32)
        images = [
            EvaluatedImage(**{**image, "results": [Result(**result) for result in image["results"]]})
            for image in values["images"]
        ]
        return cls(images, [tuple(pair) for pair in values["failed"]])

    @classmethod
    def merge(cls, parts: Sequence[Part]) -> Part:
        """The parts of all processes as one, in the order of the source."""
        images = [image for part in parts for image in part.images]
        failed = [pair for part in parts for pair in part.failed]
        return cls(sorted(images, key=lambda image: image.index), sorted(failed))


def _part_path(folder: Path, process: int) -> Path:
    return folder / f"part.{process}.json"


# ---- Features


class FeatureCache:
    """Features of images by one protocol, in files of `folder`/features.

    They are found by the hash of an image's pixels, whatever method and run the image came from.
    """

    def __init__(self, folder: Path, protocol: FeatureProtocol, *, process: int = 0) -> None:
        text = json.dumps(asdict(protocol), sort_keys=True).encode()
        self._folder, self._process = folder / "features", process
        self._name = f"{protocol.distance}-{hashlib.sha256(text).hexdigest()[:12]}"
        self._places: dict[bytes, tuple[np.ndarray, int]] = {}
        for path in sorted(self._folder.glob(f"{self._name}.*.*.features")):
            self._read(path)

    def missing(self, hashes: Iterable[str]) -> list[int]:
        """The indices of the hashes (in hex) whose features are not in the cache."""
        return [index for index, text in enumerate(hashes) if bytes.fromhex(text) not in self._places]

    def get(self, hashes: Sequence[str]) -> np.ndarray:
        """Features float32 [N,F] of images by their hashes. KeyError if one is not in the cache."""
        places = [self._places[bytes.fromhex(text)] for text in hashes]
        return np.stack([rows[index] for rows, index in places])

    def add(self, hashes: Sequence[str], features: np.ndarray) -> None:
        """Write features float32 [N,F]. UserError if they cannot be written."""
        rows = np.empty(len(hashes), _row_type(features.shape[1]))
        rows["image"] = [np.void(bytes.fromhex(text)) for text in hashes]
        rows["features"] = features
        path = self._folder / f"{self._name}.{features.shape[1]}.{self._process}.features"
        try:
            if is_url(path):  # objects cannot be appended to
                with atomic_write(path.with_name(f"{path.stem}-{uuid.uuid4().hex}.features")) as whole:
                    whole.write(rows.tobytes())
                self._places |= {bytes.fromhex(text): (rows["features"], i) for i, text in enumerate(hashes)}
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                # A killed run may have left part of a row.
                file.truncate(file.tell() // rows.itemsize * rows.itemsize)
                file.write(rows.tobytes())
        except OSError as error:
            raise UserError(f"{printable(path)} {sentence(error)}") from error
        for index, text in enumerate(hashes):
            self._places[bytes.fromhex(text)] = (rows["features"], index)

    def _read(self, path: Path) -> None:
        width = path.name.split(".")[-3]
        try:
            row_type = _row_type(int(width))
            if is_url(path):
                data = read_object(path)
                count = len(data) // row_type.itemsize
                rows = np.frombuffer(data, row_type, count)
            else:
                count = path.stat().st_size // row_type.itemsize
                rows = np.memmap(path, row_type, mode="r", shape=(count,)) if count else np.empty(0, row_type)
        except (OSError, ValueError):
            return
        images = rows["image"].tobytes()
        self._places |= {images[32 * i : 32 * i + 32]: (rows["features"], i) for i in range(count)}


def _row_type(width: int) -> np.dtype:
    return np.dtype([("image", "V32"), ("features", "<f4", (width,))])
