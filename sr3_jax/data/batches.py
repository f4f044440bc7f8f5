"""Batches of random crops, each a pure function of (seed, step), prefetched by threads.

Shape legend: B global batch, b rows of this process. Position p = step * B + row numbers every crop of a run; the
image, the corner and the flip depend only on (seed, p). A resumed run therefore sees the same data, for any number of
processes.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sr3_jax.data.sources import ImageTooSmallError, Source, center, check_side, cut
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import ImageError

_log = logging.getLogger("sr3_jax")
_MAX_REJECTIONS = 100  # in a row
_NO_LAST_STEP = 2**62
_EPOCHS = 2**63  # offset of the epochs' random streams; positions stay below


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    crop: int,
    first_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    mirror: bool = True,
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches {'image': uint8 [b,crop,crop,3], 'label': int32 [b] if the source has labels}.

    Pairs also have 'low_res', uint8 [b,crop/scale,crop/scale,3], of the same parts of the images. Each epoch is a new
    permutation of the images, with one crop of each.

    Args:
      batch_size: B, over all processes.
      rows: rows of this process (`sharding.local_rows`), in order; only these are decoded. None for all.
      first_step: the step of the first batch.
      mirror: flip half of the crops horizontally.
      threads: each makes whole batches; with 0 the caller's thread makes them.
      prefetch: number of batches made ahead of time; at least one for each thread.

    Raises:
      UserError: while iterating, 100 unusable images in a row.
    """
    import grain  # takes most of a second

    own = range(batch_size) if rows is None else [int(row) for row in rows]
    crop_at = _CropAt(source, seed=seed, crop=crop, mirror=mirror)
    steps = grain.MapDataset.range(first_step, _NO_LAST_STEP)
    pipeline = steps.map(lambda step: _stack([crop_at(int(step) * batch_size + row) for row in own]))
    # Grain reads no further than the buffer: threads without a place in it would wait.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return iter(pipeline.to_iter_dataset(options))


def center_crops(source: Source, *, crop: int, count: int) -> dict[str, np.ndarray]:
    """The center crops of `count` images at even intervals of the source: always the same ones.

    Returns one batch as `batches` yields them. An unusable image is replaced by the next usable one; with fewer than
    `count` usable images the batch is smaller, with a warning.

    Raises:
      UserError: no image is usable.
    """
    count_here = min(count, len(source))
    taken: dict[int, dict[str, Any]] = {}
    tried: set[int] = set()
    rejections = _Rejections(source)
    for first in (number * len(source) // count_here for number in range(count_here)):
        for index in ((first + offset) % len(source) for offset in range(len(source))):
            if index in tried:
                continue
            tried.add(index)
            if (item := rejections.usable(index, crop)) is not None:
                taken[index] = center(item, crop)
                break
    if not taken:
        raise UserError(
            f"{source.name} has no usable image for crop={crop}: use a smaller crop or other data"
        )
    if len(taken) < count:
        _log.warning("%s has only %d of %d usable images for crop=%d", source.name, len(taken), count, crop)
    return _stack([taken[index] for index in sorted(taken)])


class _CropAt:
    """The crop at a position."""

    def __init__(self, source: Source, *, seed: int, crop: int, mirror: bool) -> None:
        self._source = source
        self._seed = seed % 2**64
        self._crop = crop
        self._mirror = mirror
        self._rejections = _Rejections(source)
        # Grain's own shuffle walks a cycle of 2^16: 0.6 ms per index for a source of 32 images.
        self._order = functools.lru_cache(maxsize=4)(self._new_order)

    def _new_order(self, epoch: int) -> np.ndarray:
        # Raw Philox words, not Generator.permutation: NumPy guarantees the former across versions.
        return np.argsort(self._words(_EPOCHS + epoch).random_raw(len(self._source)), kind="stable").astype(
            np.uint32
        )

    def _words(self, stream: int) -> np.random.Philox:
        return np.random.Philox(key=np.array([self._seed, stream], np.uint64))

    def __call__(self, position: int) -> dict[str, Any]:
        words = self._words(position)
        down, right, mirror = (int(word) for word in words.random_raw(3))
        epoch, place = divmod(position, len(self._source))
        index = int(self._order(epoch)[place])
        for _ in range(_MAX_REJECTIONS):
            if (item := self._rejections.usable(index, self._crop)) is not None:
                break
            index = int(words.random_raw()) % len(self._source)
        else:
            raise UserError(
                f"{_MAX_REJECTIONS} images of {self._source.name} in a row are unusable for "
                f"crop={self._crop}: use a smaller crop or other data"
            )
        scale = self._source.scale or 1  # a corner is at a pixel of the low-res image
        top, left = (
            word % ((side - self._crop) // scale + 1) * scale
            for word, side in zip((down, right), item["image"].shape[:2], strict=False)
        )
        item = cut(item, top, left, self._crop)
        if self._mirror and mirror & 1:
            item |= {name: item[name][:, ::-1] for name in ("image", "low_res") if name in item}
        return item


class _Rejections:
    """Remembers unusable images and logs them: each damaged one once, and the number of small ones."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._bad: set[int] = set()
        self._small = 0
        self._lock = threading.Lock()

    def usable(self, index: int, crop: int) -> dict[str, Any] | None:
        """The image, or None if it is damaged or too small for the crop."""
        if index in self._bad:
            return None
        try:
            item = self._source[index]
            check_side(item["image"].shape[:2], crop)
            return item
        except ImageError as error:
            self._log(index, error, crop)
            return None

    def _log(self, index: int, error: ImageError, crop: int) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            if not isinstance(error, ImageTooSmallError):
                _log.warning("skipped: %s", error)
                return
            self._small += 1
            if str(self._small).strip("0") == "1":  # at 1, 10, 100, ...
                _log.warning(
                    "skipped so far because the short side is under %d pixels: %d of the %d images of %s",
                    crop,
                    self._small,
                    len(self._source),
                    self._source.name,
                )


def _stack(items: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    batch = {"image": np.stack([item["image"] for item in items])}
    if "low_res" in items[0]:
        batch["low_res"] = np.stack([item["low_res"] for item in items])
    if "label" in items[0]:
        batch["label"] = np.array([item["label"] for item in items], np.int32)
    return batch
