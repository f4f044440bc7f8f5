"""Requests of the page on the device: the file pipeline of `sr3 upscale`, with progress, and stopped within a step.

Shape legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image as PillowImage

from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import OUTPUT_FORMATS, ImageError, read_rgb
from sr3_jax.image_io.inputs import Job, find_images
from sr3_jax.inference.loading import load
from sr3_jax.inference.model import Model
from sr3_jax.inference.tiling import Tile
from sr3_jax.inference.upscale_files import upscale_files
from sr3_jax.inference.upscaling import seed_keys
from sr3_jax.metrics import PEAK
from sr3_jax.sampling import Sampling

_ABANDONED = 30.0  # seconds without a look at the progress, after which nobody waits for a job
MAX_FILES = 100
MAX_SAMPLES = 16
_STRIP, _HALO = 256, 4  # rows of the input; a halo wider than an anti-aliased bicubic reaches
PREVIEW = 512  # pixels of its longer side, at most


class Cancelled(UserError):
    """The user stopped a job, or closed the page."""


@dataclass(frozen=True)
class Request:
    """What to upscale, and how; None stands for the default of `sr3 upscale`.

    Attributes:
        files: uploaded images.
        model: a name that the device offers.
        samples: of each image, with seeds from `seed` on.
    """

    files: tuple[Path, ...]
    model: str
    seed: int = 0
    steps: int | None = None
    denoise: float | None = None
    outscale: float | None = None
    file_format: str | None = None
    samples: int = 1


@dataclass(frozen=True)
class Output:
    """An upscaled image on disk.

    Attributes:
        request: the one that it answers, with its own seed.
        source: the uploaded file.
        target: the file to download, the same bytes as those of `sr3 upscale`.
        low_res, pixels: .npy files of the input [h,w,3] and the output [H,W,3], uint8, to be read in parts.
        consistency: `metrics.consistency`; None if the output's size is no multiple of the input's.
        notes: changes made by reading the input.
        seconds: wall time.
    """

    request: Request
    source: Path
    target: Path
    low_res: Path
    pixels: Path
    consistency: float | None
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a request: outputs, and (file name, reason) of each image that failed."""

    outputs: tuple[Output, ...]
    failed: tuple[tuple[str, str], ...]


class Progress:
    """The progress of one request: written by the thread of the device, read by the page."""

    def __init__(self) -> None:
        self.text = "Waiting for the device"
        self.fraction = 0.0
        self.preview: np.ndarray | None = (
            None  # uint8 [H,W,3], the image so far; replaced, never written into
        )
        self._looked = time.monotonic()
        self._cancelled = threading.Event()

    def look(self) -> None:
        """Somebody is waiting for the result."""
        self._looked = time.monotonic()

    def cancel(self) -> None:
        """Stop the request at its next step."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `Cancelled` if nobody waits for the result."""
        if self._cancelled.is_set() or time.monotonic() - self._looked > _ABANDONED:
            raise Cancelled("cancelled")


class Device:
    """Runs requests one after the other in a thread of its own. Models are loaded when they are first used.

    Args:
        names: the models on offer: the name that the page shows, and what `sr3_jax.load` takes.
        max_megapixels: larger inputs fail, before they are decoded.
    """

    def __init__(self, names: Mapping[str, str], *, max_megapixels: float) -> None:
        self.names = dict(names)
        self.max_megapixels = max_megapixels
        self._loaded: dict[str, Model] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "device")
        self._running: set[Progress] = set()

    def submit(self, request: Request, folder: Path, progress: Progress) -> Future[Outcome]:
        """Queue a request, whose outputs go into `folder`. The future raises `Cancelled`, or another `UserError`."""
        self._running.add(progress)
        future = self._thread.submit(self._run, request, folder, progress)
        future.add_done_callback(lambda _: self._running.discard(progress))
        return future

    def close(self) -> None:
        """Cancel everything, and wait for the step that runs."""
        for progress in list(self._running):
            progress.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def model(self, name: str) -> Model:
        """The model of this name on the page."""
        with self._lock:
            if name not in self.names:
                raise UserError(
                    f"model {printable(name)!r} is not offered: use one of {', '.join(self.names)}"
                )
            if name not in self._loaded:
                self._loaded[name] = load(self.names[name])
            return self._loaded[name]

    def _run(self, request: Request, folder: Path, progress: Progress) -> Outcome:
        progress.check()
        progress.text = f"Loading {request.model}"
        model = self.model(request.model)
        sampling = model.sampling.override(steps=request.steps)
        if request.denoise is not None:
            sampling = dataclasses.replace(sampling, augment=request.denoise)
        model.check(sampling, labels=None, count=1)  # before any image is read
        seed_keys(request.seed, 1)
        if request.file_format not in (None, *OUTPUT_FORMATS):
            raise UserError(
                f"format must be one of {', '.join(OUTPUT_FORMATS)}, got {printable(request.file_format)!r}"
            )
        if not request.files:
            raise UserError("inputs must not be empty: give at least one image")
        if len(request.files) > MAX_FILES:
            raise UserError(f"at most {MAX_FILES} images at once, got {len(request.files)}: upload fewer")
        if not 1 <= request.samples <= MAX_SAMPLES:
            raise UserError(f"samples must be from 1 to {MAX_SAMPLES}, got {request.samples}")
        outputs: list[Output] = []
        failed: list[tuple[str, str]] = []
        total = len(request.files) * request.samples
        for index, source in enumerate(request.files):
            for sample in range(request.samples):
                seed = (request.seed + sample) % 2**32
                one = dataclasses.replace(request, files=(source,), seed=seed, samples=1)
                done = index * request.samples + sample
                where = folder / f"{index}_{seed}"
                result = self._upscale(model, sampling, one, where, progress, done=done, total=total)
                if isinstance(result, Output):
                    outputs.append(result)
                    continue
                failed.append((source.name, result))
                break  # other samples of this image would fail too
        return Outcome(tuple(outputs), tuple(failed))

    def _upscale(
        self,
        model: Model,
        sampling: Sampling,
        request: Request,
        folder: Path,
        progress: Progress,
        *,
        done: int,
        total: int,
    ) -> Output | str:
        """The output of one image and one seed, or the reason why it failed."""
        started = time.monotonic()
        source = request.files[0]
        progress.text = f"{printable(source.name)}: reading"
        try:
            low_res = read_rgb(source, max_megapixels=self.max_megapixels)
        except ImageError as error:  # the pipeline would give the same reason
            return str(error)
        watch = _Watch(progress, model, request, low_res, done=done, total=total)
        factor = model.scale if request.outscale is None else request.outscale
        suffix = f"_{factor:g}x_seed{request.seed}"
        found = find_images([source], folder, file_format=request.file_format, suffix=suffix)
        result = upscale_files(
            model.watched(watch.on_step),
            found.jobs,
            sampling=sampling,
            seed=request.seed,
            batch_size=jax.local_device_count(),  # as sr3 upscale
            outscale=request.outscale,
            max_megapixels=self.max_megapixels,
            on_tiles=watch.on_tiles,
        )
        if result.failed:
            return result.failed[0][1]
        watch.say("reading the output")
        target = found.jobs[0].target
        arrays = folder / "input.npy", folder / "output.npy"
        pixels = read_rgb(target, max_megapixels=1e6)
        np.save(arrays[0], low_res)
        np.save(arrays[1], pixels)
        notes = tuple(note for _, notes in result.notes for note in notes)
        notes += tuple(f"not kept: {name}" for _, names in result.not_kept for name in names)
        seconds = time.monotonic() - started
        return Output(request, source, target, *arrays, consistency(pixels, low_res), notes, seconds)


class _Watch:
    """Turns the steps and blocks of one image into progress and a preview.

    Args:
        low_res: the input, uint8 [h,w,3].
        done, total: outputs of the request that are finished, and all.
    """

    def __init__(
        self,
        progress: Progress,
        model: Model,
        request: Request,
        low_res: np.ndarray,
        *,
        done: int,
        total: int,
    ) -> None:
        self._progress, self._name = progress, printable(request.files[0].name)
        self._done, self._total = done, total
        self._plan, self._scale = model.tiling(*low_res.shape[:2]), model.scale
        self._tiles, self._count = 0, self._plan.count
        self._order = [tile for band in self._plan.bands() for tile in band]
        # The input, enlarged, into which the blocks are pasted; of further passes only the block itself is shown.
        size = (model.scale * low_res.shape[0], model.scale * low_res.shape[1])
        self._every = -(-max(size) // PREVIEW)
        small = PillowImage.fromarray(low_res).resize(
            (max(1, size[1] // self._every), max(1, size[0] // self._every)), PillowImage.Resampling.BICUBIC
        )
        self._canvas = np.array(small)
        progress.preview = self._canvas.copy()
        self.say("compiling the network")

    def say(self, what: str) -> None:
        """Set the text of the progress, and stop here if nobody waits any more."""
        number = f" ({self._done + 1} of {self._total})" if self._total > 1 else ""
        self._progress.text = f"{self._name}{number}: {what}"
        self._progress.check()

    def on_step(self, step: int, steps: int, images: np.ndarray) -> None:
        """After each step: `images` is uint8 [B,H,W,3], the blocks of this batch so far."""
        block = f"block {self._tiles + 1} of {self._count}, " if self._count > 1 else ""
        part = (self._tiles + step / steps) / self._count
        self._progress.fraction = (self._done + min(part, 1.0)) / self._total
        if self._count == self._plan.count and images.shape[1] == self._plan.rows.size * self._scale:
            tiles = self._order[self._tiles : self._tiles + len(images)]
            for tile, image in zip(tiles, images, strict=False):
                self._paste(tile, image)
            self._progress.preview = self._canvas.copy()
        self.say(f"{block}step {step} of {steps}")

    def on_tiles(self, job: Job, done: int, count: int) -> None:
        """After each batch of blocks of a large image."""
        self._tiles, self._count = done % count, count
        self._progress.check()

    def _paste(self, tile: Tile, image: np.ndarray) -> None:
        """Put the pixels that a block contributes into the preview."""
        top, left = (
            axis.edges[index] * self._scale // self._every
            for axis, index in ((self._plan.rows, tile.row), (self._plan.columns, tile.column))
        )
        part = self._plan.inner(image, tile, self._scale)[:: self._every, :: self._every]
        space = self._canvas[top : top + len(part), left : left + part.shape[1]]
        space[...] = part[: space.shape[0], : space.shape[1]]


def consistency(output: np.ndarray, low_res: np.ndarray) -> float | None:
    """`metrics.consistency` of one image in little memory: in strips of rows, on the host.

    Args:
        output: uint8 [H,W,3].
        low_res: uint8 [h,w,3].

    Returns:
        None if H x W is no multiple of h x w.
    """
    height, width = low_res.shape[:2]
    scale = output.shape[0] // height
    if output.shape[:2] != (scale * height, scale * width):
        return None
    total, bicubic = 0.0, PillowImage.Resampling.BICUBIC
    for top in range(0, height, _STRIP):
        bottom = min(top + _STRIP, height)
        first, last = max(0, top - _HALO), min(height, bottom + _HALO)
        for channel in range(3):
            strip = output[scale * first : scale * last, :, channel].astype(np.float32)
            shrunk = np.asarray(PillowImage.fromarray(strip).resize((width, last - first), bicubic))
            kept = np.clip(shrunk[top - first : bottom - first], 0, PEAK)
            total += float(np.sum(np.square(kept - low_res[top:bottom, :, channel]), dtype=np.float64))
    return 1e5 / PEAK**2 * total / low_res.size
