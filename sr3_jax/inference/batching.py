"""Run a model on streams of images of any size: shared batches, tiles, and less of both where memory is short.

Shape legend: B batch, H height, W width, s the model's scale.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.image_io.bands import resize_bands
from sr3_jax.image_io.image_file import DecodedImage, ImageError, visible_rgb
from sr3_jax.image_ops import pad_image, resize_lanczos, scaled_size
from sr3_jax.inference.tiling import Tiling
from sr3_jax.inference.upscaling import collect_bands, pass_seed, passes_for, seed_keys
from sr3_jax.memory import OutOfMemory
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

T = TypeVar("T")
Shape = tuple[int, int]
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

    def upscale(
        self, image: np.ndarray, seed: Key, *, sampling: Sampling | None = None, tile: int | None = None
    ) -> np.ndarray:
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


OnTiles = Callable[
    [int, int], object
]  # gets the finished tiles of an image, over all passes, and their number


class BatchRunner:
    """Runs a model within the memory of its devices: what did not fit is remembered for images of the same shape.

    Args:
        outscale: enlarge by this factor instead of the model's scale: the model is applied as often as needed, with
            noise of its own each time, and a Lanczos filter shrinks the result.

    Attributes:
        passes: how often the model is applied to an image.
    """

    def __init__(
        self,
        model: Upscaler,
        *,
        sampling: Sampling | None,
        seed: int,
        batch_size: int,
        tile: int | None,
        outscale: float | None = None,
    ) -> None:
        self.model = model
        self.passes = passes_for(outscale, model.scale)
        self._sampling, self._seed = sampling, seed
        self._batch_size, self._tile, self._outscale = batch_size, tile, outscale
        self._batch_sizes: dict[Shape, int] = {}  # what fits, by the shape of an image or tile in a batch
        self._tiles: dict[Shape, int] = {}

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the output for an image of this size."""
        return scaled_size((height, width), self._outscale or self.model.scale)

    def is_large(self, image: np.ndarray) -> bool:
        """Whether an image is divided into tiles."""
        return self._plan(*image.shape[:2])[0].count > 1

    def batch_shape(self, image: np.ndarray) -> tuple[int, ...]:
        """Images with the same value may share a batch."""
        plan, _ = self._plan(*image.shape[:2])
        return _shape(plan) if plan.count == 1 else image.shape

    def before_last_pass(
        self, images: list[np.ndarray], on_tiles: list[OnTiles] | None = None
    ) -> list[np.ndarray | str]:
        """What the last pass gets for each image: itself, or the output of the passes before, or why they failed."""
        results: list[np.ndarray | str] = list(images)
        for index in range(self.passes - 1):
            results = self._pass(results, index, sizes=None, on_tiles=on_tiles)
        return results

    def last_pass(
        self,
        images: list[np.ndarray | str],
        sizes: list[tuple[int, int]],
        on_tiles: list[OnTiles] | None = None,
    ) -> list[np.ndarray | str]:
        """The outputs uint8 [height,width,3] in memory for the results of `before_last_pass`."""
        return self._pass(images, self.passes - 1, sizes=sizes, on_tiles=on_tiles)

    def bands(
        self,
        image: np.ndarray,
        *,
        size: tuple[int, int] | None,
        on_tiles: OnTiles = lambda done, count: None,
        index: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The output of a large image from top to bottom.

        Args:
            image: one result of `before_last_pass`.
            size: of the output; None for the model's scale.
            index: of the pass; None for the last one.
        """
        index = self.passes - 1 if index is None else index
        height, width = image.shape[:2]
        plan, tile = self._plan(height, width)
        counts = self._tile_counts(height, width, index)
        done = sum(counts[:index])

        def count(tiles: int) -> None:
            nonlocal done
            done += tiles
            on_tiles(done, sum(counts))

        on_tiles(done, sum(counts))
        bands = self.model.upscale_bands(
            image,
            self._pass_seed(index),
            sampling=self._sampling,
            tile=tile,
            batch_size=self._batch_sizes.get(_shape(plan), self._batch_size),
            on_tiles=count,
        )
        full = (height * self.model.scale, width * self.model.scale)
        return resize_bands(bands, full, full if size is None else size)

    def less_for(self, image: np.ndarray, error: Exception) -> bool:
        """Choose smaller batches for images of this shape, or for their tiles; else smaller tiles.

        Halves one of them; if the error says how much memory is free, as often as that needs, so that nothing is
        compiled in vain.

        Returns:
            False if neither is possible.
        """
        share = error.free / error.needed if isinstance(error, OutOfMemory) else 1.0
        plan, _ = self._plan(*image.shape[:2])
        shape = _shape(plan)
        size = least = self._batch_sizes.get(shape, self._batch_size)
        for least in _smaller_batches(size):
            self._batch_sizes[shape] = least
            if least <= share * size:
                return True
        tile = None
        for tile, smaller in self._smaller_tiles(image, max(shape)):
            self._tiles[shape] = tile
            self._batch_sizes[_shape(smaller)] = least
            if least * math.prod(_shape(smaller)) <= share * size * math.prod(shape):
                break
        return tile is not None or least < size

    def _smaller_tiles(self, image: np.ndarray, side: int) -> list[tuple[int, Tiling]]:
        """Halves of a tile of this side that have room for their halo; if there is none, three quarters of it."""
        found: list[tuple[int, Tiling]] = []
        for tile in [*(side >> count for count in range(1, side.bit_length())), 3 * side // 4]:
            if tile > side // 2 and found:
                break
            with contextlib.suppress(UserError):  # no room for the halo
                smaller = self.model.tiling(*image.shape[:2], tile=tile)
                if max(_shape(smaller)) < side:
                    found.append((tile, smaller))
        return found

    def _plan(self, height: int, width: int) -> tuple[Tiling, int | None]:
        """The tiles of an image that fit into memory, and their maximum side."""
        plan, tile = self.model.tiling(height, width, tile=self._tile), self._tile
        while _shape(plan) in self._tiles:  # ends, as each is smaller than the one before
            tile = self._tiles[_shape(plan)]
            plan = self.model.tiling(height, width, tile=tile)
        return plan, tile

    def _tile_counts(self, height: int, width: int, index: int) -> list[int]:
        """Tiles of each pass, for an image that has this size before pass `index`."""
        scale = float(self.model.scale)
        return [
            self._plan(*(round(side * scale ** (other - index)) for side in (height, width)))[0].count
            for other in range(self.passes)
        ]

    def _pass_seed(self, index: int) -> int:
        seed = pass_seed(self._seed, index)
        assert isinstance(seed, int)
        return seed

    def _pass(
        self,
        images: list[np.ndarray | str],
        index: int,
        *,
        sizes: list[tuple[int, int]] | None,
        on_tiles: list[OnTiles] | None,
    ) -> list[np.ndarray | str]:
        """One pass over images of any shapes; those of one shape share batches. Reasons of failures stay."""
        results = list(images)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            if isinstance(image, str):
                continue
            if self.is_large(image):
                report = on_tiles[row] if on_tiles else lambda done, count: None
                results[row] = self._large(image, index, sizes[row] if sizes else None, report)
            else:
                groups.setdefault(self.batch_shape(image), []).append(row)
        for rows in groups.values():
            outputs = self._small([image for row in rows if not isinstance(image := images[row], str)], index)
            for row, output in zip(rows, outputs, strict=True):
                if sizes is not None and not isinstance(output, str):
                    output = resize_lanczos(output, sizes[row])
                results[row] = output
        return results

    def _small(self, images: list[np.ndarray], index: int) -> list[np.ndarray | str]:
        """The outputs of images of one shape that are not divided."""
        if not images:
            return []
        plan, tile = self._plan(*images[0].shape[:2])
        if plan.count > 1:  # since memory ran out
            return [self._large(image, index, None, lambda done, count: None) for image in images]
        shape = _shape(plan)
        size = self._batch_sizes.get(shape, self._batch_size)
        if len(images) > size:
            return self._small(images[:size], index) + self._small(images[size:], index)
        try:
            padded = [pad_image(image[None], *shape)[0] for image in images]
            batch = np.stack(padded + padded[-1:] * (size - len(padded)))  # [size,H,W,3]
            keys = seed_keys(self._pass_seed(index), size)
            outputs = np.asarray(self.model.upscale(batch, keys, sampling=self._sampling, tile=tile))
            scale = self.model.scale
            return [
                output[: scale * image.shape[0], : scale * image.shape[1]]
                for output, image in zip(outputs, images, strict=False)
            ]
        except Exception as error:  # device, compiler and network raise many types
            if is_out_of_memory(error):
                fits = self.less_for(images[0], error)
                return self._small(images, index) if fits else [no_memory(error)] * len(images)
            if isinstance(error, UserError):
                raise
            if len(images) > 1:  # find the one that fails; the others keep their batch shape
                return [output for image in images for output in self._small([image], index)]
            return [device_failure(error)]

    def _large(
        self, image: np.ndarray, index: int, size: tuple[int, int] | None, on_tiles: OnTiles
    ) -> np.ndarray | str:
        scale = self.model.scale
        while True:
            try:
                bands = self.bands(image, size=size, on_tiles=on_tiles, index=index)
                return collect_bands(bands, size or (image.shape[0] * scale, image.shape[1] * scale))
            except Exception as error:
                if not is_out_of_memory(error):
                    if isinstance(error, UserError):
                        raise
                    return device_failure(error)
                if not self.less_for(image, error):
                    return no_memory(error)


def _shape(plan: Tiling) -> Shape:
    return plan.rows.size, plan.columns.size


def _smaller_batches(size: int) -> Iterator[int]:
    """Halves of a batch: multiples of the number of devices, then fewer images than devices."""
    devices = jax.local_device_count()
    while size > devices or (size > 1 and size % devices):
        size = max(1, size // 2 // devices * devices or min(devices, size // 2))
        yield size


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
    runner: BatchRunner, items: Iterable[T], read: Callable[[T], DecodedImage], *, batch_size: int
) -> Iterator[tuple[T, DecodedImage, np.ndarray]]:
    """Yield the items in order, each with its decoded image and its output uint8 [height,width,3].

    Items are read ahead in threads, and images of one shape share batches.

    Raises:
        ImageError, MemoryError: an image cannot be read, when its turn comes.
        RuntimeError: the device failed.
    """
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
        images = [visible_rgb(image) for _, image in group]
        sizes = [runner.output_size(*image.shape[:2]) for image in images]
        outputs = runner.last_pass(runner.before_last_pass(images), sizes)
        for ((index, item), image), output in zip(group, outputs, strict=True):
            finished[index] = RuntimeError(output) if isinstance(output, str) else (item, image, output)
        while following in finished:
            result = finished.pop(following)
            following += 1
            if isinstance(result, Exception):
                raise result
            yield result
