"""Run a model on streams of images of any size: shared batches, tiles, and less of both where memory is short.

Shape legend: B batch, H height, W width, s the model's scale.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import DecodedImage, ImageError, visible_rgb
from sr3_jax.image_ops import count_passes, pad_image, resize_lanczos, scaled_size
from sr3_jax.inference.tiling import Tiling
from sr3_jax.memory import OutOfMemory
from sr3_jax.numerics import fixed_numerics
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

T = TypeVar("T")
_THREADS = 4
_WINDOW_BYTES = 512 * 2**20
_END: Any = object()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of a device, or of this machine, says that memory is missing."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def no_memory(error: Exception) -> str:
    """Why an image failed for which there is too little memory, whatever the batch and the tile."""
    return str(error) if isinstance(error, OutOfMemory) else "needs more memory than the device has"


def device_failure(error: Exception) -> str:
    """Why an image failed on the device."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FloatingPointError) else f"failed: {type(error).__name__}: {text[:160]}"


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


class BatchRunner:
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
            with fixed_numerics():
                keys = jax.vmap(jax.random.key)(jnp.full([size], self._seed, jnp.uint32))
            outputs = np.asarray(self.model.upscale(batch, keys, sampling=self._sampling))
            scale = self.model.scale
            return [
                output[: scale * image.shape[0], : scale * image.shape[1]]
                for output, image in zip(outputs, images, strict=False)
            ]
        except Exception as error:  # device, compiler and network raise many types
            if is_out_of_memory(error):
                if self._less(shape, images[0], error):
                    large = self.is_large(images[0])
                    return [self._whole(one) for one in images] if large else self.outputs(images)
                return [no_memory(error)] * len(images)
            if isinstance(error, UserError):
                raise
            if len(images) > 1:  # find the one that fails; the others keep their batch shape
                return [output for image in images for output in self.outputs([image])]
            return [device_failure(error)]

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

    def rescaled(
        self, images: list[np.ndarray], outscale: float, progress: list[Callable[[int, int], object]]
    ) -> list[np.ndarray | str]:
        """The outputs at `outscale` of images of one batch shape, or the reasons why they failed.

        Args:
            progress: for each image, gets the finished tiles of a pass and their number.
        """
        if images and self.is_large(images[0]):
            outputs = [self._whole(image, report) for image, report in zip(images, progress, strict=True)]
        else:
            outputs = self.outputs(images)
        for row, image in enumerate(images):
            output = outputs[row]
            for index in range(1, count_passes(outscale, self.model.scale)):
                if isinstance(output, str):
                    break
                later = copy.copy(self)  # with noise of its own for each pass
                later._seed = (self._seed + index) % 2**32
                large = later.is_large(output)
                output = later._whole(output, progress[row]) if large else later.outputs([output])[0]
            if not isinstance(output, str):
                height, width = image.shape[:2]
                output = resize_lanczos(output, scaled_size((height, width), outscale))
            outputs[row] = output
        return outputs

    def less_for(self, image: np.ndarray, error: Exception) -> bool:
        """Make the batches or tiles of a large image smaller after this error. False if they cannot be."""
        plan = self.model.tiling(*image.shape[:2], tile=self._tile)
        return self._less((plan.rows.size, plan.columns.size), image, error)

    def _whole(
        self, image: np.ndarray, progress: Callable[[int, int], object] = lambda done, count: None
    ) -> np.ndarray | str:
        while True:
            try:
                return np.concatenate(list(self.bands(image, progress)))
            except Exception as error:
                if not is_out_of_memory(error):
                    if isinstance(error, UserError):
                        raise
                    return device_failure(error)
                if not self.less_for(image, error):
                    return no_memory(error)

    def _less(self, shape: tuple[int, ...], image: np.ndarray, error: Exception) -> bool:
        """Choose smaller batches of images or tiles of this shape, else smaller tiles. False if neither is possible.

        Halves one of them; if the error says how much memory is free, as often as that needs, so that nothing is
        compiled in vain.
        """
        share = error.free / error.needed if isinstance(error, OutOfMemory) else 1.0
        size = least = self._limits.get(shape, self._batch_size)
        for least in _smaller_batches(size):
            self._limits[shape] = least
            if least <= share * size:
                return True
        pixels = _tile_pixels(self.model.tiling(*image.shape[:2], tile=self._tile))
        tile = None
        for tile, plan in self._smaller_tiles(image):
            self._tile = tile
            self._limits[plan.rows.size, plan.columns.size] = least
            if least * _tile_pixels(plan) <= share * size * pixels:
                break
        return tile is not None or least < size

    def _smaller_tiles(self, image: np.ndarray) -> list[tuple[int, Tiling]]:
        """Halves of the tiles of an image that have room for their halo; if there is none, three quarters of one."""
        plan = self.model.tiling(*image.shape[:2], tile=self._tile)
        side = max(plan.rows.size, plan.columns.size)
        found: list[tuple[int, Tiling]] = []
        for tile in [*(side >> count for count in range(1, side.bit_length())), 3 * side // 4]:
            if tile > side // 2 and found:
                break
            with contextlib.suppress(UserError):  # no room for the halo
                found.append((tile, self.model.tiling(*image.shape[:2], tile=tile)))
        return found


def _smaller_batches(size: int) -> Iterator[int]:
    """Halves of a batch: multiples of the number of devices, then fewer images than devices."""
    devices = jax.local_device_count()
    while size > devices or (size > 1 and size % devices):
        size = max(1, size // 2 // devices * devices or min(devices, size // 2))
        yield size


def _tile_pixels(plan: Tiling) -> int:
    return plan.rows.size * plan.columns.size


def groups_by_shape(
    items: Iterable[T],
    read: Callable[[T], DecodedImage],
    shape: Callable[[DecodedImage], tuple[int, ...]],
    *,
    batch_size: int,
    in_order: bool = False,
) -> Iterator[tuple[list[tuple[T, DecodedImage]], list[tuple[T, ImageError | MemoryError]]]]:
    """Yield groups of up to `batch_size` images of one `shape`, each with the items whose images could not be read.

    Reads ahead up to 4 batches or _WINDOW_BYTES. A full group is yielded at once; a smaller one when the window is full
    or nothing is left to read.

    Args:
        in_order: where a smaller group is yielded, it is that of the oldest image, so that none waits for long;
            otherwise the largest.
    """
    queue = iter(items)
    reads: dict[Future[DecodedImage], T] = {}
    ready: dict[tuple[int, ...], list[tuple[T, DecodedImage]]] = {}  # by shape, the oldest first
    with ThreadPoolExecutor(_THREADS, "read") as reader:
        while True:
            waiting = [image.rgb for group in ready.values() for _, image in group]
            full = len(waiting) >= 4 * batch_size or sum(rgb.nbytes for rgb in waiting) > _WINDOW_BYTES
            while not full and len(reads) < _THREADS and (item := next(queue, _END)) is not _END:
                reads[reader.submit(read, item)] = item
            # Of equally large groups, max returns the oldest.
            chosen = max(ready.values(), key=lambda group: min(len(group), batch_size), default=[])
            leave = len(chosen) >= batch_size or full or not reads
            if in_order and len(chosen) < batch_size:
                chosen = next(iter(ready.values()), [])
            unread: list[tuple[T, ImageError | MemoryError]] = []
            for future in wait(reads, 0 if leave else None, FIRST_COMPLETED).done:
                item = reads.pop(future)
                error = future.exception()
                if isinstance(error, ImageError | MemoryError):
                    unread.append((item, error))
                elif error is not None:
                    raise error
                else:
                    ready.setdefault(shape(future.result()), []).append((item, future.result()))
            group = chosen[:batch_size] if leave else []
            if group:
                rest = chosen[len(group) :]
                del ready[shape(group[0][1])]
                if rest:
                    ready[shape(rest[0][1])] = rest
            if group or unread:
                yield group, unread
            elif leave and not reads and not ready:
                return


def upscale_each(
    model: Upscaler,
    items: Iterable[T],
    read: Callable[[T], DecodedImage],
    *,
    sampling: Sampling | None,
    seed: int,
    batch_size: int,
    tile: int | None,
) -> Iterator[tuple[T, DecodedImage, np.ndarray]]:
    """Yield the items in order, each with its decoded image and the output uint8 [sH,sW,3].

    Items are read ahead in threads, and images of one shape share batches.

    Raises:
        ImageError, MemoryError: an image cannot be read, when its turn comes.
        RuntimeError: the device failed.
    """
    runner = BatchRunner(model, sampling=sampling, seed=seed, batch_size=batch_size, tile=tile)
    finished: dict[int, Any] = {}
    following = 0
    groups = groups_by_shape(
        enumerate(items),
        lambda entry: read(entry[1]),
        lambda image: runner.batch_shape(image.rgb),
        batch_size=batch_size,
        in_order=True,
    )
    for group, unread in groups:
        finished |= {index: error for (index, _), error in unread}
        outputs = runner.outputs([visible_rgb(image) for _, image in group])
        for ((index, item), image), output in zip(group, outputs, strict=True):
            finished[index] = RuntimeError(output) if isinstance(output, str) else (item, image, output)
        while following in finished:
            result = finished.pop(following)
            following += 1
            if isinstance(result, Exception):
                raise result
            yield result
