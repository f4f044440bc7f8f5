"""Make training examples on the device: from uint8 crops to the target image and its condition.

Shape legend: B batch, H height, W width, C channels, s the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sr3_jax.degradations import CLEAN, ConditioningAugmentation, Degradation
from sr3_jax.image_ops import degrade, to_unit, upsample
from sr3_jax.types import Conditioning, Image, Key

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """The recipe for making a target and its condition from a crop. Static at trace time.

    Attributes:
        scale: s, the super-resolution factor; None for a base stage, which has no low-res image.
        shrink: downsample the crops by this factor first, so that the stages of a cascade share one data set.
        degradation: makes the low-res image from the target.
        augmentation: of the low-res image in training; None for none.
        num_classes: number of labels; label `num_classes` means "no label".
        label_dropout: fraction of the training examples whose label becomes "no label", as classifier-free guidance
            needs it (Ho and Salimans 2021).
        upsampling: of the low-res image for the network, as in `image_ops.upsample`.
    """

    scale: int | None
    shrink: int = 1
    degradation: Degradation = CLEAN
    augmentation: ConditioningAugmentation | None = None
    num_classes: int = 0
    label_dropout: float = 0.0
    upsampling: str = "bicubic"

    @property
    def random(self) -> bool:
        """Whether making a training example needs a key."""
        return not self.degradation.is_clean or self.augmentation is not None or self.label_dropout > 0

    def target(self, batch: Batch) -> Image:
        """[B,H/shrink,W/shrink,C] in [-1,1] from uint8 'image' [B,H,W,C]."""
        image = to_unit(batch["image"])
        return image if self.shrink == 1 else degrade(image, self.shrink)

    def low_res(self, batch: Batch, target: Image, key: Key | None = None) -> Image | None:
        """The low-res images [B,H/s,W/s,C] of a batch: those that it has, else made; None for a base stage.

        Args:
            target: `self.target(batch)`.
            key: one key for the batch or [B] keys, for a random degradation. In evaluation each example has its own
                fixed key; None downsamples by bicubic.
        """
        if self.scale is None:
            return None
        if "low_res" in batch:  # pairs
            return to_unit(batch["low_res"])
        if key is None or self.degradation.is_clean:
            return degrade(target, self.scale)
        return self.degradation.apply(key, target, self.scale)


def condition(
    low_res: Image | None,
    scale: int | None,
    label: jax.Array | None = None,
    strength: jax.Array | None = None,
    *,
    upsampling: str = "bicubic",
) -> Conditioning:
    """The condition of the network.

    Args:
        low_res: [B,h,w,C] in [-1,1], which is upsampled to [B,s*h,s*w,C].
        label: [B] int32.
        strength: [B] of the conditioning augmentation.
        upsampling: as in `image_ops.upsample`.
    """
    cond: dict[str, jax.Array] = {}
    if low_res is not None and scale is not None:
        cond["upsampled"] = upsample(low_res, scale, upsampling)
    if label is not None:
        cond["label"] = label
    if strength is not None:
        cond["augment"] = strength
    return cond


def make_pair(
    batch: Batch, task: Task, key: Key | None = None, *, low_res: Image | None = None
) -> tuple[Image, Conditioning]:
    """The target [B,H/shrink,W/shrink,C] in [-1,1] of uint8 crops, and its condition.

    Args:
        batch: 'image' uint8 [B,H,W,C], 'label' int32 [B] if there are labels, and 'low_res' uint8 [B,H/s,W/s,C] of
            pairs, for which `task.degradation` is clean.
        key: for degradation, augmentation and label dropout; None applies none of them, as in evaluation.
        low_res: the low-res images [B,H/s,W/s,C] where they are known already; None makes them.
    """
    target = task.target(batch)
    if low_res is None and key is not None and not task.degradation.is_clean:
        key, degradation_key = jax.random.split(key)
        low_res = task.low_res(batch, target, degradation_key)
    elif low_res is None:
        low_res = task.low_res(batch, target)
    label, strength = batch.get("label"), None
    if key is not None:
        augment_key, label_key = jax.random.split(key)
        if task.augmentation is not None and low_res is not None:
            low_res, strength = task.augmentation.sample(augment_key, low_res)
        if task.label_dropout > 0 and label is not None:
            dropped = jax.random.bernoulli(label_key, task.label_dropout, label.shape)
            label = jnp.where(dropped, task.num_classes, label)
    return target, condition(low_res, task.scale, label, strength, upsampling=task.upsampling)
