"""Batches: a pure function of (seed, step), the same for any number of processes, exact crops of the images."""

import itertools
import logging
import threading
import time

import numpy as np
import pytest

from sr3_jax.data.batches import batches, center_crops
from sr3_jax.data.sources import Source
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import ImageError

CROP = 5


@pytest.fixture
def logged(monkeypatch):
    """Log messages. (caplog gets them twice once a command has set up logging.)"""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("sr3_jax"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("sr3_jax"), "level", logging.INFO)
    return messages


def image(index, height=9, width=12):
    """Every pixel encodes its image, row and column."""
    down, right = np.mgrid[:height, :width]
    return np.stack([np.full_like(down, index), down, right], -1).astype(np.uint8)


def source(count=7, *, bad=(), small=(), labels=False, reads=None):
    def load(index):
        if reads is not None:
            reads.append(index)
        if index in bad:
            raise ImageError("is truncated")
        size = (CROP - 1, 12) if index in small else (9 + index % 3, 12)
        return {"image": image(index, *size)} | ({"label": index + 100} if labels else {})

    return Source("fake", load, count, cache_mb=0 if reads is not None else 16)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_shape_and_type():
    (batch,) = take(batches(source(labels=True), seed=0, batch_size=6, crop=CROP), 1)
    assert batch["image"].shape == (6, CROP, CROP, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32
    (batch,) = take(batches(source(), seed=0, batch_size=6, crop=CROP), 1)
    assert set(batch) == {"image"}


def test_a_batch_depends_only_on_seed_and_step():
    """Not on threads, prefetch or earlier reads."""
    expected = take(batches(source(), seed=3, batch_size=6, crop=CROP, threads=0), 20)
    for threads, prefetch in ((1, 1), (4, 4), (8, 2)):
        made = batches(source(), seed=3, batch_size=6, crop=CROP, threads=threads, prefetch=prefetch)
        equal(take(made, 20), expected)
    other = take(batches(source(), seed=4, batch_size=6, crop=CROP), 20)
    assert sum((a["image"] != b["image"]).any() for a, b in zip(expected, other, strict=True)) == 20
    images = [batch["image"].tobytes() for batch in expected]
    assert len(set(images)) == 20  # and no step repeats another


def test_crops_are_the_same_in_every_version():
    """A checkpoint resumed under a later version must see the same data."""
    (batch,) = take(batches(source(), seed=3, batch_size=8, crop=CROP, first_step=1000), 1)
    assert batch["image"][:, 0, 0].tolist() == [
        [0, 0, 8],
        [6, 0, 4],
        [5, 6, 7],
        [0, 4, 7],
        [4, 3, 0],
        [1, 0, 8],
        [2, 0, 7],
        [3, 3, 5],
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_union_over_processes_is_the_batch_of_one(count, interleaved):
    whole = take(batches(source(labels=True), seed=1, batch_size=8, crop=CROP), 10)
    order = np.arange(8).reshape(-1, count).T if interleaved else np.arange(8).reshape(count, -1)
    parts = [
        take(batches(source(labels=True), seed=1, batch_size=8, crop=CROP, rows=rows), 10) for rows in order
    ]
    assert all(part[0]["image"].shape[0] == 8 // count for part in parts)
    back = np.argsort(order.reshape(-1))
    union = [
        {name: np.concatenate([part[step][name] for part in parts])[back] for name in ("image", "label")}
        for step in range(10)
    ]
    equal(union, whole)


def test_a_process_reads_only_its_own_rows():
    reads = []
    made = batches(source(count=64, reads=reads), seed=0, batch_size=8, crop=CROP, rows=[2, 3], threads=0)
    take(made, 3)
    assert len(reads) == 3 * 2


def test_first_step_resumes_the_run_without_reading_earlier_batches():
    whole = take(batches(source(labels=True), seed=9, batch_size=6, crop=CROP), 30)
    for first in (1, 13, 29):
        tail = batches(source(labels=True), seed=9, batch_size=6, crop=CROP, first_step=first)
        equal(take(tail, 30 - first), whole[first:])
    reads = []
    take(batches(source(reads=reads), seed=9, batch_size=6, crop=CROP, first_step=10**12, threads=0), 1)
    assert len(reads) == 6


def test_crops_are_parts_of_the_image_and_half_of_them_flipped():
    made = source()
    flipped, corners = 0, set()
    for batch in take(batches(made, seed=5, batch_size=16, crop=CROP), 40):
        for crop in batch["image"]:
            flip = crop[0, 0, 2] > crop[0, -1, 2]
            crop = crop[:, ::-1] if flip else crop
            index, top, left = (int(value) for value in crop[0, 0])
            whole = made[index]["image"]
            np.testing.assert_array_equal(crop, whole[top : top + CROP, left : left + CROP])
            flipped += int(flip)
            corners.add((index, top, left))
    assert 0.43 < flipped / 640 < 0.57

    heights = [9 + index % 3 for index in range(7)]
    possible = {
        (index, top, left)
        for index in range(7)
        for top in range(heights[index] - CROP + 1)
        for left in range(12 - CROP + 1)
    }
    assert corners <= possible
    assert len(corners) > 0.75 * len(possible)  # 332 corners, 640 samples: 1 - e^-1.9
    assert {top for index, top, _ in corners if index == 2} == set(range(7))  # both edges reached
    assert {left for _, _, left in corners} == set(range(8))


def test_flips_can_be_turned_off():
    for batch in take(batches(source(), seed=5, batch_size=16, crop=CROP, mirror=False), 4):
        assert (batch["image"][:, 0, 0, 2] < batch["image"][:, 0, -1, 2]).all()


def test_an_epoch_has_every_image_once_in_a_new_order():
    crops = np.concatenate([b["image"] for b in take(batches(source(), seed=2, batch_size=3, crop=CROP), 14)])
    order = crops[:42, 0, 0, 0].reshape(6, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 6


def test_unusable_images_are_replaced_and_logged(logged):
    arguments = {"seed": 0, "batch_size": 4, "crop": CROP}
    made = take(batches(source(bad=(1, 4), small=(2,)), **arguments), 30)
    seen = {int(index) for batch in made for index in batch["image"][:, 0, 0, 0]}
    assert seen == {0, 3, 5, 6}
    assert len(logged) == 3
    for words in (("record 1", "truncated"), ("record 4", "truncated"), (f"{CROP} pixels", "1 of the 7")):
        assert any(all(word in line for word in words) for line in logged)
    # Still pure: the other rows are unchanged, and a resumed run gets the same replacements.
    equal(take(batches(source(bad=(1, 4), small=(2,)), first_step=17, **arguments), 13), made[17:])
    for batch, clean in zip(made, take(batches(source(), **arguments), 30), strict=True):
        for crop, clean_crop in zip(batch["image"], clean["image"], strict=True):
            if clean_crop[0, 0, 0] not in (1, 2, 4):
                np.testing.assert_array_equal(crop, clean_crop)


def test_all_threads_read_at_once():
    """Also with a smaller `prefetch`: a slow disk or bucket is read as fast as the threads can wait for it."""
    meeting = threading.Barrier(6)

    def load(index: int) -> dict[str, np.ndarray]:
        meeting.wait(timeout=20)  # broken if fewer threads read at the same time
        return {"image": np.zeros((CROP, CROP, 3), np.uint8)}

    take(batches(Source("slow", load, 12), seed=0, batch_size=1, crop=CROP, threads=6, prefetch=2), 1)


def test_an_image_that_several_threads_find_damaged_is_logged_once(logged):

    def load(index):
        time.sleep(0.05)
        if index == 0:
            raise ImageError("is truncated")
        return {"image": image(index)}

    take(batches(Source("slow", load, 2), seed=0, batch_size=2, crop=CROP, threads=8, prefetch=8), 8)
    (line,) = logged
    assert "record 0" in line and "truncated" in line


@pytest.mark.parametrize("threads", [0, 2])
def test_a_source_without_usable_images_is_an_error(threads):
    with pytest.raises(UserError, match=r"fake.*crop=50"):
        next(batches(source(), seed=0, batch_size=2, crop=50, threads=threads))


def test_batches_are_prefetched_by_threads():
    """The next batches are made while the caller computes, so the device does not wait."""
    started = []

    def load(index):
        started.append(threading.get_ident())
        time.sleep(0.05)
        return {"image": image(index)}

    made = batches(
        Source("slow", load, 7, cache_mb=0), seed=0, batch_size=2, crop=CROP, threads=4, prefetch=4
    )
    next(made)
    time.sleep(0.5)  # a training step
    before = time.monotonic()
    take(made, 4)  # 8 reads of 50 ms without prefetch
    assert time.monotonic() - before < 0.2
    assert threading.get_ident() not in started and len(set(started)) > 1


def test_center_crops_are_at_even_intervals_and_always_the_same():
    batch = center_crops(source(8, labels=True), crop=CROP, count=4)
    assert batch["label"].tolist() == [100, 102, 104, 106]
    for crop, index in zip(batch["image"], (0, 2, 4, 6), strict=True):
        height = 9 + index % 3
        top = (height - CROP) // 2
        np.testing.assert_array_equal(crop, image(index, height)[top : top + CROP, 3 : 3 + CROP])


def test_center_crops_skip_unusable_images(logged):
    batch = center_crops(source(8, bad=(2,), small=(3,)), crop=CROP, count=4)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 4, 5, 6]
    batch = center_crops(source(8, bad=(2,), small=(3, 7)), crop=CROP, count=99)
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 4, 5, 6]
    assert "5 of 99" in logged[-1]
    with pytest.raises(UserError, match=r"fake.*crop=50"):
        center_crops(source(), crop=50, count=4)


def pairs(count=7, scale=3):
    """Low-res images whose pixels are every third one of the others."""

    def load(index):
        whole = image(index, scale * (4 + index % 3), 12)
        return {"image": whole, "low_res": np.ascontiguousarray(whole[::scale, ::scale])}

    return Source("pairs", load, count, scale=scale)


def test_both_images_of_a_pair_are_cropped_and_flipped_together():
    flipped, corners = [], set()
    for batch in [
        *take(batches(pairs(), seed=3, batch_size=4, crop=6), 12),
        center_crops(pairs(), crop=6, count=4),
    ]:
        assert (batch["image"].shape[1:], batch["low_res"].shape[1:]) == ((6, 6, 3), (2, 2, 3))
        for large, small in zip(batch["image"], batch["low_res"], strict=True):
            flipped.append(large[0, 0, 2] > large[0, 1, 2])
            where = slice(None, None, -1) if flipped[-1] else slice(None)
            np.testing.assert_array_equal(large[:, where][::3, ::3], small[:, where])
            corners.add(tuple(large[:, where][0, 0, 1:]))
    assert {top % 3 for top, _ in corners} == {0} and len(corners) > 5
    assert 10 < sum(flipped) < 38
