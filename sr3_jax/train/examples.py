"""From uint8 crops to what the network learns from: the target and the condition made from it, on the device.

Shape legend: B batch, H height, W width, C channels, s the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sr3_jax.degradations import ConditioningAugmentation
from sr3_jax.image_ops import degrade, to_unit, upsample
from sr3_jax.types import Conditioning, Image, Key

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Task:
    """What a network is trained to make, and out of what. Fixed at trace time.

    Attributes:
        scale: s of the super-resolution; None: no low-res image at all, the base stage of a cascade.
        shrink: the crops are shrunk by it first, by the one bicubic: stages of a cascade share one data set.
        augmentation: of the low-res image in training.
        num_classes, label_dropout: the share of examples whose label becomes `num_classes`, "no label", in training:
            what guidance without a classifier (Ho and Salimans 2021) needs.
    """

    scale: int | None
    shrink: int = 1
    augmentation: ConditioningAugmentation | None = None
    num_classes: int = 0
    label_dropout: float = 0.0

    @property
    def random(self) -> bool:
        """Whether an example in training is drawn, not only computed."""
        return self.augmentation is not None or self.label_dropout > 0

    def target(self, batch: Batch) -> Image:
        """[B,H/shrink,W/shrink,C] in [-1,1] from uint8 'image' [B,H,W,C]."""
        image = to_unit(batch["image"])
        return image if self.shrink == 1 else degrade(image, self.shrink)

    def low_res(self, target: Image) -> Image | None:
        """The low-res image of a target; None for a base stage."""
        return None if self.scale is None else degrade(target, self.scale)


def condition(
    low_res: Image | None,
    scale: int | None,
    label: jax.Array | None = None,
    strength: jax.Array | None = None,
) -> Conditioning:
    """What the network is told: low_res [B,h,w,C] in [-1,1] upsampled to [B,s*h,s*w,C], label [B], strength [B]."""
    cond: dict[str, jax.Array] = {}
    if low_res is not None and scale is not None:
        cond["upsampled"] = upsample(low_res, scale)
    if label is not None:
        cond["label"] = label
    if strength is not None:
        cond["augment"] = strength
    return cond


def make_pair(batch: Batch, task: Task, key: Key | None = None) -> tuple[Image, Conditioning]:
    """uint8 crops -> the target in [-1,1] and the condition made from it.

    Args:
        batch: 'image' uint8 [B,H,W,C], and 'label' int32 [B] if there are labels.
        key: draws the augmentation and the dropped labels; None: as when sampling, without either.
    """
    target = task.target(batch)
    low_res, label, strength = task.low_res(target), batch.get("label"), None
    if key is not None:
        augment_key, label_key = jax.random.split(key)
        if task.augmentation is not None and low_res is not None:
            low_res, strength = task.augmentation.sample(augment_key, low_res)
        if task.label_dropout > 0 and label is not None:
            dropped = jax.random.bernoulli(label_key, task.label_dropout, label.shape)
            label = jnp.where(dropped, task.num_classes, label)
    return target, condition(low_res, task.scale, label, strength)
