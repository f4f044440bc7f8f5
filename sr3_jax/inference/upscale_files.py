"""Upscale image files of any size.

Threads read and write files while the device computes. Memory is bounded by a number of images and bytes, whatever the
size of the folder. Shape legend: B batch, H height, W width, s the model's scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.bands import BAND_SUFFIXES, write_bands
from sr3_jax.image_io.errors import reason
from sr3_jax.image_io.image_file import (
    DecodedImage,
    ImageError,
    read_image,
    require_writable,
    visible_rgb,
    with_pixels,
    write_image,
)
from sr3_jax.image_io.inputs import Found, Job, find_images, split_finished
from sr3_jax.image_ops import pad_image
from sr3_jax.inference.tiling import Tiling
from sr3_jax.sampling import Sampling
from sr3_jax.storage import is_disk_full
from sr3_jax.types import Key

__all__ = ["Found", "Job", "UpscaleResult", "Upscaler", "find_images", "split_finished", "upscale_files"]

DEFAULT_MAX_MEGAPIXELS = 64.0  # at 4x the output has a gigapixel, 3 GB
_THREADS = 4
_WINDOW_BYTES = 512 * 2**20


class Upscaler(Protocol):
    """The interface of `sr3_jax.Model` that this module uses."""

    @property
    def scale(self) -> int: ...

    def tiling(self, height: int, width: int, *, tile: int | None = None) -> Tiling: ...

    def upscale(self, image: np.ndarray, seed: Key, *, sampling: Sampling | None = None) -> np.ndarray:
        """uint8 [B,H,W,3] and keys [B] to uint8 [B,sH,sW,3]."""
        ...

    def upscale_bands(
        self,
        image: np.ndarray,
        seed: int,
        *,
        sampling: Sampling | None = None,
        tile: int | None = None,
        batch_size: int | None = None,
        on_tiles: Callable[[int], object] = ...,
    ) -> Iterator[np.ndarray]:
        """uint8 [H,W,3] to the rows uint8 [*,sW,3] of the output, from top to bottom."""
        ...


@dataclass(frozen=True)
class UpscaleResult:
    """The outcome of `upscale_files`, in the order of the jobs.

    Attributes:
        done: outputs that were written.
        skipped: outputs that existed.
        failed: inputs, each with the reason.
        notes: inputs that reading changed, each with the changes.
    """

    done: tuple[Path, ...]
    skipped: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]
    notes: tuple[tuple[Path, tuple[str, ...]], ...]


def upscale_files(
    model: Upscaler,
    jobs: Iterable[Job],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 1,
    tile: int | None = None,
    overwrite: bool = False,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    on_result: Callable[[Job, str | None], object] = lambda job, failure: None,
    on_tiles: Callable[[Job, int, int], object] = lambda job, done, count: None,
) -> UpscaleResult:
    """Upscale the image of each job into its target. An image that fails is recorded and does not stop the others.

    An output depends only on the pixels, the model, `sampling`, `seed` and `batch_size`: each image gets the key of
    `seed` itself, and an incomplete batch is filled with copies, since a program compiled for another batch shape may
    round differently. Images of similar size share batches, as they are padded to one of a few sizes. A large image is
    divided into tiles, which share batches, and is written from top to bottom where its format allows that. What does
    not fit into device memory is divided into smaller batches, then into smaller tiles.

    Args:
        sampling: settings of the sampler; None for the model's own.
        batch_size: images or tiles per batch.
        tile: maximum side of a tile in pixels of the input; None for the model's default.
        overwrite: otherwise existing targets are skipped.
        max_megapixels: larger inputs fail.
        on_result: called in this thread after each image, with the reason if it failed and None if it was written.
        on_tiles: called in this thread with the finished tiles of a large image and their number.

    Raises:
        UserError: something that would fail for all images, such as an unknown solver.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    jobs = list(jobs)
    to_do, finished = split_finished(jobs, overwrite=overwrite)
    failures: dict[Job, str] = {}
    notes: dict[Job, tuple[str, ...]] = {}
    writes: dict[Future[None], tuple[Job, int]] = {}  # pending, with their bytes
    device = _Device(model, sampling=sampling, seed=seed, batch_size=batch_size, tile=tile)

    def finish(job: Job, failure: str | None) -> None:
        if failure is not None:
            failures[job] = failure
        on_result(job, failure)

    def finish_writes(*, max_count: int, max_bytes: int) -> None:
        """Finish the jobs whose writes are done, and wait until few enough writes are pending."""
        while writes:
            too_many = len(writes) > max_count or sum(size for _, size in writes.values()) > max_bytes
            for future in wait(writes, None if too_many else 0, FIRST_COMPLETED).done:
                finish(writes.pop(future)[0], _failure(future))
            if not too_many:
                return

    def read(job: Job) -> DecodedImage:
        image = read_image(job.source, max_megapixels=max_megapixels)
        height, width = (model.scale * side for side in image.rgb.shape[:2])
        require_writable(job.target, height=height, width=width, alpha=image.alpha is not None)
        return image

    def shape(image: DecodedImage) -> tuple[int, ...]:
        return device.batch_shape(image.rgb)

    with ThreadPoolExecutor(_THREADS, "write") as writer:
        for group, unread in _groups(to_do, read, shape, batch_size=batch_size):
            for job, failure in unread:
                finish(job, failure)
            for job, image in group:
                notes[job] = image.notes
            if group and device.is_large(group[0][1].rgb):
                for job, image in group:
                    progress = functools.partial(on_tiles, job)
                    finish(job, _upscale_large(device, job, image, progress))
                continue
            outputs = device.outputs([visible_rgb(image) for _, image in group])
            for (job, image), output in zip(group, outputs, strict=True):
                if isinstance(output, str):
                    finish(job, output)
                    continue
                writes[writer.submit(_write, job.target, image, output)] = (job, output.nbytes)
            finish_writes(max_count=2 * batch_size, max_bytes=_WINDOW_BYTES)
        finish_writes(max_count=0, max_bytes=0)
    return UpscaleResult(
        done=tuple(job.target for job in to_do if job not in failures),
        skipped=tuple(job.target for job in finished),
        failed=tuple((job.source, failures[job]) for job in to_do if job in failures),
        notes=tuple((job.source, notes[job]) for job in to_do if notes.get(job) and job not in failures),
    )


class _Device:
    """Runs a model within the memory of its devices: what did not fit is remembered for later images."""

    def __init__(
        self, model: Upscaler, *, sampling: Sampling | None, seed: int, batch_size: int, tile: int | None
    ) -> None:
        self.model = model
        self._sampling, self._seed = sampling, seed
        self._batch_size, self._tile = batch_size, tile
        self._limits: dict[tuple[int, ...], int] = {}  # batch sizes by shape of a batch's images or tiles

    def is_large(self, image: np.ndarray) -> bool:
        """Whether an image is divided into tiles."""
        return self.model.tiling(*image.shape[:2], tile=self._tile).count > 1

    def batch_shape(self, image: np.ndarray) -> tuple[int, ...]:
        """Images with the same value may share a batch."""
        plan = self.model.tiling(*image.shape[:2], tile=self._tile)
        return (plan.rows.size, plan.columns.size) if plan.count == 1 else image.shape

    def outputs(self, images: list[np.ndarray]) -> list[np.ndarray | str]:
        """The output [sH,sW,3] of each image [H,W,3] of one batch shape, or the reason why it failed."""
        if not images:
            return []
        shape = self.batch_shape(images[0])
        size = self._limits.get(shape, self._batch_size)
        if len(images) > size:
            return self.outputs(images[:size]) + self.outputs(images[size:])
        try:
            padded = [pad_image(image[None], shape[0], shape[1])[0] for image in images]
            batch = np.stack(padded + padded[-1:] * (size - len(padded)))  # [size,H,W,3]
            keys = jax.vmap(jax.random.key)(jnp.full([size], self._seed, jnp.uint32))
            outputs = np.asarray(self.model.upscale(batch, keys, sampling=self._sampling))
            scale = self.model.scale
            return [
                output[: scale * image.shape[0], : scale * image.shape[1]]
                for output, image in zip(outputs, images, strict=False)
            ]
        except UserError:
            raise
        except Exception as error:  # device, compiler and network raise many types
            if _is_out_of_memory(error):
                if self._less(shape):
                    large = self.is_large(images[0])
                    return [self._whole(one) for one in images] if large else self.outputs(images)
                return [_NO_MEMORY] * len(images)
            if len(images) > 1:  # find the one that fails; the others keep their batch shape
                return [output for image in images for output in self.outputs([image])]
            return [_reason(error)]

    def bands(self, image: np.ndarray, progress: Callable[[int, int], object]) -> Iterator[np.ndarray]:
        """The output of a large image from top to bottom; `progress` gets the finished tiles and their number."""
        plan, done = self.model.tiling(*image.shape[:2], tile=self._tile), 0

        def count(tiles: int) -> None:
            nonlocal done
            done += tiles
            progress(done, plan.count)

        shape = (plan.rows.size, plan.columns.size)
        return self.model.upscale_bands(
            image,
            self._seed,
            sampling=self._sampling,
            tile=self._tile,
            batch_size=self._limits.get(shape, self._batch_size),
            on_tiles=count,
        )

    def less_for(self, image: np.ndarray) -> bool:
        """Make the batches or tiles of a large image smaller. False if they cannot be."""
        plan = self.model.tiling(*image.shape[:2], tile=self._tile)
        return self._less((plan.rows.size, plan.columns.size))

    def _whole(self, image: np.ndarray) -> np.ndarray | str:
        while True:
            try:
                return np.concatenate(list(self.bands(image, lambda done, count: None)))
            except UserError:
                raise
            except Exception as error:
                if not _is_out_of_memory(error):
                    return _reason(error)
                if not self.less_for(image):
                    return _NO_MEMORY

    def _less(self, shape: tuple[int, ...]) -> bool:
        """Halve the batch of this shape, as a multiple of the devices; then the tile. False if neither is possible."""
        devices, size = jax.local_device_count(), self._limits.get(shape, self._batch_size)
        if size > devices or (size > 1 and size % devices):
            self._limits[shape] = max(1, size // 2 // devices * devices or min(devices, size // 2))
            return True
        for tile in (max(shape[:2]) // 2, 3 * max(shape[:2]) // 4):
            try:
                self.model.tiling(*shape[:2], tile=tile)
            except UserError:  # no room for the halo
                continue
            self._tile = tile
            return True
        return False


def _upscale_large(
    device: _Device, job: Job, image: DecodedImage, progress: Callable[[int, int], object]
) -> str | None:
    """Upscale and write one image in tiles; the reason if it failed."""
    rgb = visible_rgb(image)
    while True:
        try:
            bands = device.bands(rgb, progress)
            if job.target.suffix.lower() in BAND_SUFFIXES:
                _make_folder(job.target.parent)
                write_bands(job.target, image, bands, scale=device.model.scale)
            else:
                _write(job.target, image, np.concatenate(list(bands)))
            return None
        except ImageError as error:
            _raise_if_full(error)
            return str(error)
        except UserError:
            raise
        except Exception as error:  # device, compiler and network raise many types
            if not _is_out_of_memory(error):
                return _reason(error)
            if not device.less_for(rgb):
                return _NO_MEMORY


def _groups(
    jobs: Iterable[Job],
    read: Callable[[Job], DecodedImage],
    shape: Callable[[DecodedImage], tuple[int, ...]],
    *,
    batch_size: int,
) -> Iterator[tuple[list[tuple[Job, DecodedImage]], list[tuple[Job, str]]]]:
    """Yield groups of up to `batch_size` images of one `shape`, each with the jobs whose images could not be read.

    Reads ahead up to 4 batches or _WINDOW_BYTES. A full group is yielded at once; a smaller one when the window is full
    or nothing is left to read.
    """
    queue = iter(jobs)
    reads: dict[Future[DecodedImage], Job] = {}
    ready: dict[tuple[int, ...], list[tuple[Job, DecodedImage]]] = {}  # by shape
    with ThreadPoolExecutor(_THREADS, "read") as reader:
        while True:
            waiting = [image.rgb for group in ready.values() for _, image in group]
            full = len(waiting) >= 4 * batch_size or sum(rgb.nbytes for rgb in waiting) > _WINDOW_BYTES
            while not full and len(reads) < _THREADS and (job := next(queue, None)) is not None:
                reads[reader.submit(read, job)] = job
            # Of equally large groups, max returns the oldest.
            largest = max(ready.values(), key=lambda group: min(len(group), batch_size), default=[])
            leave = len(largest) >= batch_size or full or not reads
            unread = []
            for future in wait(reads, 0 if leave else None, FIRST_COMPLETED).done:
                job, failure = reads.pop(future), _failure(future)
                if failure is not None:
                    unread.append((job, failure))
                else:
                    ready.setdefault(shape(future.result()), []).append((job, future.result()))
            group = largest[:batch_size] if leave else []
            if group:
                ready[shape(group[0][1])] = largest[len(group) :]
                ready = {size: images for size, images in ready.items() if images}
            if group or unread:
                yield group, unread
            elif leave and not reads and not ready:
                return


_NO_MEMORY = "needs more memory than the device has"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FloatingPointError) else f"failed: {type(error).__name__}: {text[:160]}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error


def _write(target: Path, image: DecodedImage, rgb: np.ndarray) -> None:
    """Write the upscaled pixels, uint8 [sH,sW,3], with the alpha and metadata of `image`."""
    _make_folder(target.parent)
    write_image(target, with_pixels(image, rgb))


def _raise_if_full(error: BaseException) -> None:
    if is_disk_full(error):
        raise UserError("the disk of the output is full: make room and run the same command again") from error


def _failure(future: Future) -> str | None:
    """Why a finished read or write failed, None if it did not; raises what concerns all images, such as a full disk."""
    error = future.exception()
    if error is None:
        return None
    _raise_if_full(error)
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    raise error
