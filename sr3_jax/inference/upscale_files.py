"""Upscale image files of any size.

Threads read and write files while the device computes. Memory is bounded by a number of images and bytes, whatever the
size of the folder. Shape legend: B batch, H height, W width, s the model's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
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

    def upscale(
        self, image: np.ndarray, seed: Key, *, steps: int | None = None, solver: str | None = None
    ) -> np.ndarray:
        """uint8 [B,H,W,3] and keys [B] to uint8 [B,sH,sW,3]."""
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
    steps: int | None = None,
    solver: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    overwrite: bool = False,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    on_result: Callable[[Job, str | None], None] = lambda job, failure: None,
) -> UpscaleResult:
    """Upscale the image of each job into its target. An image that fails is recorded and does not stop the others.

    An output depends only on the pixels, the model, `steps`, `solver`, `seed` and `batch_size`: each image gets the key
    of `seed` itself, and an incomplete batch is filled with copies, since a program compiled for another batch shape
    may round differently. Only a batch that does not fit into device memory is processed one image at a time.

    Args:
        steps, solver: override the model's sampling settings.
        batch_size: images of one size per batch; above 1 is faster for folders of images of equal size.
        overwrite: otherwise existing targets are skipped.
        max_megapixels: larger inputs fail.
        on_result: called in this thread after each image, with the reason if it failed and None if it was written.

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

    def run(images: np.ndarray) -> np.ndarray:
        keys = jax.vmap(jax.random.key)(jnp.full([len(images)], seed, jnp.uint32))
        return np.asarray(model.upscale(images, keys, steps=steps, solver=solver))

    with ThreadPoolExecutor(_THREADS, "write") as writer:
        for group, unread in _groups(to_do, read, batch_size=batch_size):
            for job, failure in unread:
                finish(job, failure)
            outputs = _outputs(run, [visible_rgb(image) for _, image in group], batch_size)
            for (job, image), output in zip(group, outputs, strict=True):
                if isinstance(output, str):
                    finish(job, output)
                    continue
                notes[job] = image.notes
                writes[writer.submit(_write, job.target, image, output)] = (job, output.nbytes)
            finish_writes(max_count=2 * batch_size, max_bytes=_WINDOW_BYTES)
        finish_writes(max_count=0, max_bytes=0)
    return UpscaleResult(
        done=tuple(job.target for job in to_do if job not in failures),
        skipped=tuple(job.target for job in finished),
        failed=tuple((job.source, failures[job]) for job in to_do if job in failures),
        notes=tuple((job.source, notes[job]) for job in to_do if notes.get(job)),
    )


def _groups(
    jobs: Iterable[Job], read: Callable[[Job], DecodedImage], *, batch_size: int
) -> Iterator[tuple[list[tuple[Job, DecodedImage]], list[tuple[Job, str]]]]:
    """Yield groups of up to `batch_size` images of one size, each with the jobs whose images could not be read.

    Reads ahead up to 4 batches or _WINDOW_BYTES. A full group is yielded at once; a smaller one when the window is full
    or nothing is left to read.
    """
    queue = iter(jobs)
    reads: dict[Future[DecodedImage], Job] = {}
    ready: dict[tuple[int, ...], list[tuple[Job, DecodedImage]]] = {}  # by (H, W, 3)
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
                    ready.setdefault(future.result().rgb.shape, []).append((job, future.result()))
            group = largest[:batch_size] if leave else []
            if group:
                ready[group[0][1].rgb.shape] = largest[len(group) :]
                ready = {size: images for size, images in ready.items() if images}
            if group or unread:
                yield group, unread
            elif leave and not reads and not ready:
                return


def _outputs(
    run: Callable[[np.ndarray], np.ndarray], images: list[np.ndarray], batch_size: int
) -> list[np.ndarray | str]:
    """The output [sH,sW,3] of each image [H,W,3], or the reason why it failed."""
    if not images:
        return []
    try:
        batch = np.stack(images + images[-1:] * (batch_size - len(images)))  # [batch_size,H,W,3]
        return list(run(batch)[: len(images)])
    except UserError:
        raise
    except Exception as error:  # device, compiler and network raise many types
        text = " ".join(str(error).split())
        memory = (
            isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        )
        if memory and batch_size > 1:
            return [output for image in images for output in _outputs(run, [image], 1)]
        if not memory and len(images) > 1:  # find the one that fails; the others keep their batch shape
            return [output for image in images for output in _outputs(run, [image], batch_size)]
        if memory:
            return ["needs more memory than the device has"]
        return [
            text if isinstance(error, FloatingPointError) else f"failed: {type(error).__name__}: {text[:160]}"
        ]


def _write(target: Path, image: DecodedImage, rgb: np.ndarray) -> None:
    """Write the upscaled pixels, uint8 [sH,sW,3], with the alpha and metadata of `image`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error
    write_image(target, with_pixels(image, rgb))


def _failure(future: Future) -> str | None:
    """Why a finished read or write failed, None if it did not; raises what concerns all images, such as a full disk."""
    error = future.exception()
    if error is None:
        return None
    if is_disk_full(error):
        raise UserError("the disk of the output is full: make room and run the same command again") from error
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    raise error
