"""A fixed set of crops of a few images, to compare samplers on.

Shape legend: N crops of C x C pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sr3_jax.data.sources import Source, cut, open_source, squares
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import ImageError
from sr3_jax.image_ops import degrade, to_uint8, to_unit


@dataclass(frozen=True, eq=False)
class Crops:
    """Crops for a search.

    Attributes:
        images: uint8 [N,C,C,3].
        labels: int32 [N] where the source has them.
        source_images: the number of images they come from.
        low_res: uint8 [N,C/scale,C/scale,3] where the source has them.
    """

    images: np.ndarray
    labels: np.ndarray | None
    source_images: int
    low_res: np.ndarray | None = None

    def whole_batches(self, size: int) -> Crops:
        """Without the last crops that do not fill a batch."""
        count = len(self.images) // size * size
        labels, low_res = (None if one is None else one[:count] for one in (self.labels, self.low_res))
        return Crops(self.images[:count], labels, self.source_images, low_res)


def search_and_check(
    data: str,
    eval_data: str | None,
    *,
    crop: int,
    count: int,
    square: bool = False,
    shrink: int = 1,
    scale: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Crops, Crops]:
    """Up to `count` crops to search on, and as many of other images to check the result on.

    Args:
        data, eval_data: names of sources; without the second, every other image of the first is used for the check.
        crop: side of a crop in pixels, after downsampling.
        square: whether images are cropped to their central square first.
        shrink: the factor by which larger crops are downsampled, as for the stage of a cascade.
        scale: that pairs must have.
        limit: only the first images of `data`.

    Raises:
        UserError: there are too few images, or they are too small.
    """
    side = crop * shrink

    def opened(name: str) -> Source:
        return (
            squares(open_source(name, cache_mb=0), side)
            if square
            else open_source(name, min_side=side, scale=scale)
        )

    first = opened(data)
    images = range(min(len(first), limit or len(first)))
    if eval_data:
        second = opened(eval_data)
        indices = list(images), list(range(len(second)))
    else:
        second, indices = first, halves(len(images))
        if not indices[1]:
            raise UserError(
                f"data={data} has only one usable image and none is left for the check: set eval_data"
            )
    search, check = (
        shrunk(crops_of(source, chosen, crop=side, count=count, seed=seed), shrink)
        for source, chosen in zip((first, second), indices, strict=True)
    )
    return search, check


def shrunk(crops: Crops, factor: int) -> Crops:
    """The crops downsampled as the stage of a cascade was trained on them (`config.data.shrink`)."""
    if factor == 1:
        return crops
    if crops.low_res is not None:
        raise UserError(f"pairs cannot be downsampled by config.data.shrink={factor}: use a folder of images")
    return replace(crops, images=np.asarray(to_uint8(degrade(to_unit(crops.images), factor))))


def halves(count: int) -> tuple[list[int], list[int]]:
    """The indices below `count`, alternately in two sets: one to search on, one to validate on."""
    return list(range(0, count, 2)), list(range(1, count, 2))


def crops_of(source: Source, numbers: Sequence[int], *, crop: int, count: int, seed: int) -> Crops:
    """Up to `count` non-overlapping crops, taken evenly from the images.

    Args:
        numbers: indices of images in the source; if there are more than `count`, at even intervals.
        seed: determines the order of the crops of an image.

    Raises:
        UserError: no image is usable.
    """
    chosen = (
        [numbers[place * len(numbers) // count] for place in range(count)]
        if len(numbers) > count
        else numbers
    )
    items: list[tuple[dict[str, Any], list[tuple[int, int]]]] = []
    failure = ""
    for number in chosen:
        try:
            item = source[number]
        except ImageError as error:
            failure = failure or f" (first unusable image: {error})"
            continue
        height, width = item["image"].shape[:2]
        down, right = height // crop, width // crop
        scale = source.scale or 1
        tops, lefts = (
            (height - down * crop) // 2 // scale * scale,
            (width - right * crop) // 2 // scale * scale,
        )
        words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(down * right)
        places = [divmod(int(place), right) for place in np.argsort(words, kind="stable")] if right else []
        items.append((item, [(tops + row * crop, lefts + column * crop) for row, column in places]))
    found: list[dict[str, Any]] = []
    for turn in range(max((len(places) for _, places in items), default=0)):
        for item, places in items:
            if turn < len(places) and len(found) < count:
                top, left = places[turn]
                found.append(cut(item, top, left, crop))
    if not found:
        raise UserError(
            f"{source.name} has no image of {crop}x{crop} pixels or more{failure}: use a smaller --crop or other data"
        )
    labeled = all("label" in item for item in found)
    return Crops(
        np.stack([item["image"] for item in found]),
        np.array([item["label"] for item in found], np.int32) if labeled else None,
        sum(bool(places) for _, places in items),
        np.stack([item["low_res"] for item in found]) if source.scale else None,
    )
