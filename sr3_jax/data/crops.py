"""Many crops of few images, the same ones every time: what samplings are compared on.

Shape legend: N crops of C x C pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sr3_jax.data.sources import Source
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import ImageError


@dataclass(frozen=True, eq=False)
class Crops:
    """images uint8 [N,C,C,3], labels int32 [N] where the source has them, out of `images` images."""

    images: np.ndarray
    labels: np.ndarray | None
    source_images: int

    def whole_batches(self, size: int) -> Crops:
        """Without the last ones, which would not fill a batch."""
        count = len(self.images) // size * size
        labels = None if self.labels is None else self.labels[:count]
        return Crops(self.images[:count], labels, self.source_images)


def halves(count: int) -> tuple[list[int], list[int]]:
    """The numbers of `count` images in two parts, by turns: one for a search, one to see what it is worth."""
    return list(range(0, count, 2)), list(range(1, count, 2))


def crops_of(source: Source, numbers: Sequence[int], *, crop: int, count: int, seed: int) -> Crops:
    """Up to `count` crops that do not overlap, as many from each image as there can be.

    Args:
        numbers: the images of the source to take; of more than `count`, some spread evenly.
        seed: decides which crops of an image come first.

    Raises:
        UserError: no image can be used.
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
            failure = failure or f"; the first that cannot be used: {error}"
            continue
        height, width = item["image"].shape[:2]
        down, right = height // crop, width // crop
        tops, lefts = (height - down * crop) // 2, (width - right * crop) // 2
        words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(down * right)
        places = [divmod(int(place), right) for place in np.argsort(words, kind="stable")] if right else []
        items.append((item, [(tops + row * crop, lefts + column * crop) for row, column in places]))
    found: list[tuple[np.ndarray, int | None]] = []
    for turn in range(max((len(places) for _, places in items), default=0)):
        for item, places in items:
            if turn < len(places) and len(found) < count:
                top, left = places[turn]
                found.append((item["image"][top : top + crop, left : left + crop], item.get("label")))
    if not found:
        raise UserError(
            f"no image of {source.name} gives a crop of {crop} pixels{failure}: use a smaller --crop or other data"
        )
    labelled = all(label is not None for _, label in found)
    return Crops(
        np.stack([image for image, _ in found]),
        np.array([label for _, label in found], np.int32) if labelled else None,
        sum(bool(places) for _, places in items),
    )
