"""Training examples: shrinking, base stages, label dropout and conditioning augmentation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr3_jax.degradations import ConditioningAugmentation
from sr3_jax.image_ops import degrade, to_unit, upsample
from sr3_jax.train.examples import Task, condition, make_pair


def batch(count: int = 6, side: int = 16) -> dict:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return {"image": image, "label": np.arange(count, dtype=np.int32)}


def test_shrunk_target_equals_the_low_res_image_of_the_next_stage():
    """The target of the middle stage of a cascade is the low-res image of the last one."""
    crops = batch()
    target, cond = make_pair(crops, Task(scale=2, shrink=2))
    _, above = make_pair(crops, Task(scale=2))
    assert target.shape == (6, 8, 8, 3)
    np.testing.assert_array_equal(upsample(target, 2), above["upsampled"])
    np.testing.assert_array_equal(cond["upsampled"], upsample(degrade(target, 2), 2))


def test_base_stage_is_conditioned_on_the_label_only():
    target, cond = make_pair(batch(), Task(scale=None, shrink=4, num_classes=6))
    assert target.shape == (6, 4, 4, 3) and set(cond) == {"label"}
    assert condition(None, None) == {}


def test_labels_are_dropped_only_in_training():
    crops = batch(2000, 4)
    crops["label"] = crops["label"] % 10
    task = Task(scale=None, num_classes=10, label_dropout=0.2)
    _, cond = make_pair(crops, task, jax.random.key(0))
    dropped = np.asarray(cond["label"]) == 10
    assert abs(dropped.mean() - 0.2) < 0.03
    np.testing.assert_array_equal(np.asarray(cond["label"])[~dropped], crops["label"][~dropped])
    _, cond = make_pair(crops, task)
    np.testing.assert_array_equal(cond["label"], crops["label"])


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_only_the_condition_is_augmented_and_only_in_training(kind):
    crops, task = batch(), Task(scale=2, augmentation=ConditioningAugmentation(kind, 0.9, share=0.5))
    target, cond = make_pair(crops, task, jax.random.key(1))
    np.testing.assert_array_equal(target, to_unit(crops["image"]))
    clean = upsample(degrade(target, 2), 2)
    changed = np.asarray(jnp.any(cond["upsampled"] != clean, axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed, np.asarray(cond["augment"]) > 0)
    assert 0 < changed.sum() < 6
    _, cond = make_pair(crops, task)
    assert set(cond) == {"upsampled", "label"}
    np.testing.assert_array_equal(cond["upsampled"], clean)


def test_given_low_res_images_are_the_condition_and_are_augmented_too():
    crops = batch() | {"low_res": np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)}
    target, cond = make_pair(crops, Task(scale=2))
    np.testing.assert_array_equal(target, to_unit(crops["image"]))
    np.testing.assert_allclose(cond["upsampled"], upsample(to_unit(crops["low_res"]), 2), atol=1e-6)
    task = Task(scale=2, augmentation=ConditioningAugmentation("noise", 0.9, share=1.0))
    _, augmented = make_pair(crops, task, jax.random.key(0))
    assert np.any(np.asarray(augmented["upsampled"]) != cond["upsampled"])
