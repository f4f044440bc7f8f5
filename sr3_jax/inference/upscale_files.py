"""Image files of any size through a model, and back to files.

Shape legend: B images in a batch, H height, W width, s the model's scale. Reading and writing run in
threads beside the device; what is in memory is bounded by a window of images and bytes, not by the folder.
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
    with_pixels,
    write_image,
)
from sr3_jax.image_io.inputs import Found, Job, find_images, split_finished
from sr3_jax.types import Key

__all__ = ["Found", "Job", "UpscaleResult", "Upscaler", "find_images", "split_finished", "upscale_files"]

DEFAULT_MAX_MEGAPIXELS = 64.0  # a 4x output of a gigapixel, 3 GB
_THREADS = 4
_WINDOW_BYTES = 512 * 2**20


class Upscaler(Protocol):
    """What `upscale_files` needs of a model: `sr3_jax.Model` is one."""

    @property
    def scale(self) -> int: ...

    def upscale(
        self, image: np.ndarray, seed: Key, *, steps: int | None = None, solver: str | None = None
    ) -> np.ndarray:
        """uint8 [B,H,W,3] and keys [B] to uint8 [B,sH,sW,3]."""
        ...


@dataclass(frozen=True)
class UpscaleResult:
    """What became of the jobs, each in the order of the jobs. `notes` tells what reading changed."""

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
    """Upscale every job's image into its target; one that fails is reported and the others go on.

    A result depends on the image's pixels, the model, `steps`, `solver`, `seed` and `batch_size` alone:
    each image gets the key of `seed` itself, and a batch that is not full is filled up with copies, since
    another batch shape is another compiled program, which may round differently. So a `batch_size` above 1
    pays for folders of images of one size. (Only a batch too large for the device is done one by one.)

    Existing targets are skipped unless `overwrite`. `on_result(job, failure)` is called in this thread after
    each image, failure None if it is written. Raises UserError for what would fail every image alike,
    such as an unknown solver.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    jobs = list(jobs)
    to_do, finished = split_finished(jobs, overwrite=overwrite)
    failures: dict[Job, str] = {}
    notes: dict[Job, tuple[str, ...]] = {}
    writes: dict[Future[None], tuple[Job, int]] = {}  # with their bytes

    def settle(job: Job, failure: str | None) -> None:
        if failure is not None:
            failures[job] = failure
        on_result(job, failure)

    def settle_writes(*, count: int, size: int) -> None:
        """Settle what is written; wait until at most `count` writes of `size` bytes in all are under way."""
        while writes:
            over = len(writes) > count or sum(held for _, held in writes.values()) > size
            for future in wait(writes, None if over else 0, FIRST_COMPLETED).done:
                settle(writes.pop(future)[0], _failure(future))
            if not over:
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
                settle(job, failure)
            outputs = _outputs(run, [image.rgb for _, image in group], batch_size)
            for (job, image), output in zip(group, outputs, strict=True):
                if isinstance(output, str):
                    settle(job, output)
                    continue
                notes[job] = image.notes
                writes[writer.submit(_write, job.target, image, output)] = (job, output.nbytes)
            settle_writes(count=2 * batch_size, size=_WINDOW_BYTES)
        settle_writes(count=0, size=0)
    return UpscaleResult(
        done=tuple(job.target for job in to_do if job not in failures),
        skipped=tuple(job.target for job in finished),
        failed=tuple((job.source, failures[job]) for job in to_do if job in failures),
        notes=tuple((job.source, notes[job]) for job in to_do if notes.get(job)),
    )


def _groups(
    jobs: Iterable[Job], read: Callable[[Job], DecodedImage], *, batch_size: int
) -> Iterator[tuple[list[tuple[Job, DecodedImage]], list[tuple[Job, str]]]]:
    """Groups of up to `batch_size` images of one size, and what could not be read meanwhile.

    Reads ahead up to 4 batches or _WINDOW_BYTES, and a full group leaves at once; a smaller one only when the
    window is full of other sizes or no more images come.
    """
    queue = iter(jobs)
    reads: dict[Future[DecodedImage], Job] = {}
    ready: dict[tuple[int, ...], list[tuple[Job, DecodedImage]]] = {}  # by (H, W, 3)
    with ThreadPoolExecutor(_THREADS, "read") as reader:
        while True:
            held = [image.rgb for group in ready.values() for _, image in group]
            full = len(held) >= 4 * batch_size or sum(rgb.nbytes for rgb in held) > _WINDOW_BYTES
            while not full and len(reads) < _THREADS and (job := next(queue, None)) is not None:
                reads[reader.submit(read, job)] = job
            most = max(
                ready.values(), key=lambda group: min(len(group), batch_size), default=[]
            )  # oldest of equals
            go = len(most) >= batch_size or full or not reads
            unread = []
            for future in wait(reads, 0 if go else None, FIRST_COMPLETED).done:
                job, failure = reads.pop(future), _failure(future)
                if failure is not None:
                    unread.append((job, failure))
                else:
                    ready.setdefault(future.result().rgb.shape, []).append((job, future.result()))
            group = most[:batch_size] if go else []
            if group:
                ready[group[0][1].rgb.shape] = most[len(group) :]
                ready = {size: images for size, images in ready.items() if images}
            if group or unread:
                yield group, unread
            elif go and not reads and not ready:
                return


def _outputs(
    run: Callable[[np.ndarray], np.ndarray], images: list[np.ndarray], batch_size: int
) -> list[np.ndarray | str]:
    """For each of `images` [H,W,3] its output [sH,sW,3], or the reason why there is none."""
    if not images:
        return []
    try:
        batch = np.stack(images + images[-1:] * (batch_size - len(images)))  # [batch_size,H,W,3]
        return list(run(batch)[: len(images)])
    except UserError:
        raise
    except Exception as error:  # device, compiler and network each fail in their own way
        text = " ".join(str(error).split())
        memory = (
            isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        )
        if memory and batch_size > 1:
            return [output for image in images for output in _outputs(run, [image], 1)]
        if not memory and len(images) > 1:  # one of them is to blame; the others keep their batch shape
            return [output for image in images for output in _outputs(run, [image], batch_size)]
        if memory:
            return ["needs more memory than the device has"]
        return [
            text if isinstance(error, FloatingPointError) else f"failed: {type(error).__name__}: {text[:160]}"
        ]


def _write(target: Path, image: DecodedImage, rgb: np.ndarray) -> None:
    """Write the upscaled `rgb` uint8 [sH,sW,3] with the alpha and metadata of `image`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error
    write_image(target, with_pixels(image, rgb))


def _failure(future: Future) -> str | None:
    """None, or why the image of a finished read or write failed; what is no image's fault is raised."""
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    raise error
