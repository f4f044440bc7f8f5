"""Upscale image files of any size.

Threads read and write files while the device computes. Memory is bounded by a number of images and bytes, whatever the
size of the folder. Shape legend: B batch, H height, W width, s the model's scale.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.bands import is_written_in_bands, write_bands
from sr3_jax.image_io.errors import reason
from sr3_jax.image_io.image_file import (
    DecodedImage,
    ImageError,
    not_storable,
    read_image,
    require_writable,
    visible_rgb,
    with_pixels,
    write_image,
)
from sr3_jax.image_io.inputs import Found, Job, find_images, split_finished
from sr3_jax.inference.batching import (
    BatchRunner,
    OnTiles,
    Upscaler,
    device_failure,
    groups_by_shape,
    is_out_of_memory,
    no_memory,
)
from sr3_jax.sampling import Sampling
from sr3_jax.storage import is_disk_full

__all__ = ["Found", "Job", "UpscaleResult", "Upscaler", "find_images", "split_finished", "upscale_files"]

DEFAULT_MAX_MEGAPIXELS = 64.0  # at 4x the output has a gigapixel, 3 GB
_THREADS = 4
_WINDOW_BYTES = 512 * 2**20


@dataclass(frozen=True)
class UpscaleResult:
    """The outcome of `upscale_files`, in the order of the jobs.

    Attributes:
        done: outputs that were written.
        skipped: outputs that existed.
        failed: inputs, each with the reason.
        notes: inputs that reading changed, each with the changes.
        not_kept: inputs with metadata that their outputs do not have, each with its names.
    """

    done: tuple[Path, ...]
    skipped: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]
    notes: tuple[tuple[Path, tuple[str, ...]], ...]
    not_kept: tuple[tuple[Path, tuple[str, ...]], ...] = ()


def upscale_files(
    model: Upscaler,
    jobs: Iterable[Job],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 1,
    tile: int | None = None,
    outscale: float | None = None,
    quality: int | None = None,
    overwrite: bool = False,
    max_megapixels: float = DEFAULT_MAX_MEGAPIXELS,
    on_start: Callable[[Sequence[Job]], object] = lambda jobs: None,
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
        outscale: enlarge by this factor, 1 to 64, instead of the model's scale: the model is applied as often as
            needed, and a Lanczos filter shrinks the result to round(outscale * side).
        quality: of JPEG and WebP outputs, as in `write_image`.
        overwrite: otherwise existing targets are skipped.
        max_megapixels: larger inputs fail, also those of the second and later passes of the model.
        on_start: called in this thread with the images of a batch before the device computes them.
        on_result: called in this thread after each image, with the reason if it failed and None if it was written.
        on_tiles: called in this thread with the finished tiles of a large image and their number, 0 before the first.

    Raises:
        UserError: something that would fail for all images, such as an unknown solver.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    device = BatchRunner(
        model, sampling=sampling, seed=seed, batch_size=batch_size, tile=tile, outscale=outscale
    )
    jobs = list(jobs)
    to_do, finished = split_finished(jobs, overwrite=overwrite)
    failures: dict[Job, str] = {}
    notes: dict[Job, tuple[str, ...]] = {}
    not_kept: dict[Job, tuple[str, ...]] = {}
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
                finish(writes.pop(future)[0], _failure(future.exception()))
            if not too_many:
                return

    def read(job: Job) -> DecodedImage:
        image = read_image(job.source, max_megapixels=max_megapixels)
        height, width = image.rgb.shape[:2]
        enlarged = model.scale ** (device.passes - 1)  # the input of the last pass
        if enlarged > 1 and height * width * enlarged**2 > max_megapixels * 1e6:
            raise ImageError(
                f"would have {width * enlarged}x{height * enlarged} pixels before the last pass of the model, above "
                f"the limit of {max_megapixels:g} megapixels"
            )
        height, width = device.output_size(height, width)
        alpha = image.alpha is not None
        require_writable(job.target, height=height, width=width, alpha=alpha, quality=quality)
        return image

    def shape(image: DecodedImage) -> tuple[int, ...]:
        return device.batch_shape(image.rgb)

    def listed(texts: dict[Job, tuple[str, ...]]) -> tuple[tuple[Path, tuple[str, ...]], ...]:
        return tuple((job.source, texts[job]) for job in to_do if texts.get(job) and job not in failures)

    with ThreadPoolExecutor(_THREADS, "write") as writer:
        for group, unread in groups_by_shape(to_do, read, shape, batch_size=batch_size):
            for job, error in unread:
                finish(job, _failure(error))
            for job, image in group:
                notes[job] = image.notes
                not_kept[job] = (*image.dropped, *not_storable(job.target, image))
            if group:
                on_start([job for job, _ in group])
            images = [visible_rgb(image) for _, image in group]
            sizes = [device.output_size(*image.shape[:2]) for image in images]
            reports: list[OnTiles] = [functools.partial(on_tiles, job) for job, _ in group]
            inputs = device.before_last_pass(images, reports)
            rest = []  # what is written at once, by threads, while the device goes on
            for row, (job, image) in enumerate(group):
                pixels = inputs[row]
                if isinstance(pixels, str) or not (
                    device.is_large(pixels) and is_written_in_bands(job.target)
                ):
                    rest.append(row)
                    continue
                on_start([job])
                report = reports[row]
                finish(job, _write_large(device, job, image, pixels, sizes[row], quality, report))
            if 0 < len(rest) < len(group):
                on_start([group[row][0] for row in rest])
            outputs = device.last_pass(
                [inputs[row] for row in rest], [sizes[row] for row in rest], [reports[row] for row in rest]
            )
            for row, output in zip(rest, outputs, strict=True):
                job, image = group[row]
                if isinstance(output, str):
                    finish(job, output)
                    continue
                writes[writer.submit(_write, job.target, image, output, quality)] = (job, output.nbytes)
            finish_writes(max_count=2 * batch_size, max_bytes=_WINDOW_BYTES)
        finish_writes(max_count=0, max_bytes=0)
    return UpscaleResult(
        done=tuple(job.target for job in to_do if job not in failures),
        skipped=tuple(job.target for job in finished),
        failed=tuple((job.source, failures[job]) for job in to_do if job in failures),
        notes=listed(notes),
        not_kept=listed(not_kept),
    )


def _write_large(
    device: BatchRunner,
    job: Job,
    image: DecodedImage,
    pixels: np.ndarray,
    size: tuple[int, int],
    quality: int | None,
    on_tiles: OnTiles,
) -> str | None:
    """Write the output of the last pass from top to bottom; the reason if it failed."""
    while True:
        try:
            _make_folder(job.target.parent)
            bands = device.bands(pixels, size=size, on_tiles=on_tiles)
            write_bands(job.target, image, bands, size=size, quality=quality)
            return None
        except ImageError as error:
            _raise_if_full(error)
            return str(error)
        except Exception as error:  # device, compiler and network raise many types
            if not is_out_of_memory(error):
                if isinstance(error, UserError):
                    raise
                return device_failure(error)
            if not device.less_for(pixels, error):
                return no_memory(error)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"could not be written: {reason(error)}") from error


def _write(target: Path, image: DecodedImage, rgb: np.ndarray, quality: int | None) -> None:
    """Write the upscaled pixels, uint8 [sH,sW,3], with the alpha and metadata of `image`."""
    _make_folder(target.parent)
    write_image(target, with_pixels(image, rgb), quality=quality)


def _raise_if_full(error: BaseException) -> None:
    if is_disk_full(error):
        raise UserError("the disk of the output is full: make room and run the same command again") from error


def _failure(error: BaseException | None) -> str | None:
    """Why a finished read or write failed, None if it did not; raises what concerns all images, such as a full disk."""
    if error is None:
        return None
    _raise_if_full(error)
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, MemoryError):
        return "needs more memory than is available"
    raise error
