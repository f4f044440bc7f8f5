"""The ground truth of an evaluation and its low-res images, which are made from it or given as pairs.

Shape legend: B batch, H x W the ground truth, h x w its low-res image. Images are uint8 NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sr3_jax.data.sources import cut
from sr3_jax.features.metric_suite import low_res_of, stack_padded
from sr3_jax.files import sha256_hex


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """A ground-truth image at a method's scale.

    Attributes:
        image: uint8 [H,W,3].
        hash: of its pixels.
        label: its class, or 0.
        top, left: where it starts in the whole image.
        low_res: uint8 [h,w,3] of a pair; None if it is to be made.
    """

    name: str
    image: np.ndarray
    hash: str
    label: int
    top: int = 0
    left: int = 0
    low_res: np.ndarray | None = None

    @classmethod
    def of(cls, name: str, item: Mapping[str, Any], scale: int, crop: int | None) -> GroundTruth:
        """That of an item of a source: its center of `crop` pixels squared, cut to a multiple of the scale."""
        top = left = 0
        if crop is not None:
            height, width = item["image"].shape[:2]
            align = scale if "low_res" in item else 1
            top, left = ((side - crop) // 2 // align * align for side in (height, width))
            item = cut(item, top, left, crop)
        height, width = item["image"].shape[:2]
        image = np.ascontiguousarray(item["image"][: height // scale * scale, : width // scale * scale])
        return cls(name, image, sha256_hex(image), item.get("label", 0), top, left, item.get("low_res"))

    def low_res_image(self, scale: int, degradation: str) -> np.ndarray:
        """Its low-res image uint8 [h,w,3]: that of the pair, or made as `low_res_of` does."""
        return low_res_of_truths([self], self.image[None], scale, degradation)[0]


def low_res_of_truths(
    truths: Sequence[GroundTruth], batch: np.ndarray, scale: int, degradation: str
) -> np.ndarray:
    """Low-res images uint8 [B,h,w,3] of ground truths stacked as a padded batch [B,H,W,3]."""
    given = [truth.low_res for truth in truths if truth.low_res is not None]
    if given:
        return stack_padded(given, len(batch))
    # A random degradation depends on the pixels of the ground truth only.
    seeds = stack_padded([degradation_seed(truth.hash) for truth in truths], len(batch))
    return low_res_of(batch, scale, degradation=degradation, seeds=seeds)


def degradation_seed(truth_hash: str) -> np.uint32:
    """The seed of the random degradation of an image, from the hash of its pixels."""
    return np.uint32(int(truth_hash[8:16], 16))
