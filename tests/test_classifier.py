"""The project's classifier: its layers in NumPy, its training, its file."""

from __future__ import annotations

import itertools
import json
import types

import jax
import numpy as np
import pytest
from plain_layers import convolution
from safetensors.numpy import load, save

from sr3_jax.errors import UserError
from sr3_jax.features import classifier, training
from sr3_jax.image_ops import resize_bicubic, to_unit
from sr3_jax.nn.classifier import ClassifierNetwork

TINY = ClassifierNetwork(3, width=8, patch=2)


def random_params(network, size=(12, 12), seed=0):
    """Weights in the network's shapes, none of them the zeros that it starts with."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: classifier.init_params(network, size, key), jax.random.key(0))
    return jax.tree.map(lambda a: random.normal(0.0, 0.3, a.shape).astype(np.float32), shapes)


def quarters(count, side=12, seed=0):
    """Grey noise with one bright quarter: its number, of three in the upper and left parts, is the label."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, side, side, 3)).astype(np.uint8)
    half = side // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * half :][:half, column * half :][:, :half] += 100
    return images, labels


def group_norm(x, params, groups):
    parts = x.reshape(*x.shape[:3], groups, -1)
    mean = parts.mean(axis=(1, 2, 4), keepdims=True)
    variance = parts.var(axis=(1, 2, 4), keepdims=True)
    x = ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    return x * params["scale"] + params["bias"]


def same(x, kernel, stride):
    """A convolution with as much padding as makes ceil(side / stride) places, the odd one behind."""
    size = kernel.shape[0]
    margins = []
    for side in x.shape[1:3]:
        total = max((-(-side // stride) - 1) * stride + size - side, 0)
        margins.append((total // 2, total - total // 2))
    return convolution(np.pad(x, ((0, 0), *margins, (0, 0))), kernel.transpose(3, 2, 0, 1), stride)


def plain_network(params, x):
    """Patches of 2, width 8: 2, 4 and 8 groups, for 8, 16 and 32 channels."""
    x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    places = [x[:, row::2, column::2] for row in range(2) for column in range(2)]
    x = same(np.concatenate(places, axis=-1), params["stem"]["kernel"], 1)
    for level, groups in enumerate((2, 4, 8)):
        block = params[f"_Residual_{level}"]
        before = group_norm(x, block["Norm_0"]["GroupNorm_0"], groups if level == 0 else groups // 2)
        h = np.maximum(before, 0)
        stride = 2 if level else 1
        skip = same(h, block["skip"]["kernel"], stride) if level else x
        h = same(h, block["Conv_0"]["kernel"], stride)
        h = np.maximum(group_norm(h, block["Norm_1"]["GroupNorm_0"], groups), 0)
        x = skip + same(h, block["Conv_1"]["kernel"], 1)
    x = np.maximum(group_norm(x, params["Norm_0"]["GroupNorm_0"], 8), 0).reshape(len(x), -1)
    features = np.maximum(x @ params["features"]["kernel"] + params["features"]["bias"], 0)
    return features, features @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("size", [(12, 12), (14, 11)])
def test_the_network_is_that_of_plain_numpy(size):
    params = random_params(TINY, size)
    x = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    found = TINY.apply({"params": params}, x)
    wanted = plain_network(jax.tree.map(lambda a: a.astype(np.float64), params), x.astype(np.float64))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_it_learns_and_a_seed_gives_the_same_weights_again():
    images, labels = quarters(60)
    quiet = training.Augmentation(mirror=False, contrast=0.2)
    seen = []

    def trained(seed, steps):
        return training.train_classifier(
            images, labels, TINY, steps=steps, batch_size=20, seed=seed, learning_rate=1e-2, augmentation=quiet,
            on_step=seen.append,
        )  # fmt: skip

    others, truth = quarters(30, seed=1)
    one = classifier.TrainedClassifier("", "", TINY, trained(0, 60), 12, 12, {})
    assert np.mean(one.logits(others).argmax(axis=1) == truth) == 1.0
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[-1].loss < 0.7 * seen[0].loss and seen[-1].accuracy > 0.9
    assert all(0 <= progress.share < 1 for progress in seen)
    first, again, other = (jax.tree.leaves(trained(seed, 2)) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_minutes_end_the_training(monkeypatch):
    clock = itertools.count(step=6.0)  # seconds: a look at the clock takes a tenth of a minute
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    images, labels = quarters(20)
    seen = []
    training.train_classifier(
        images, labels, TINY, steps=1000, minutes=1.0, batch_size=20, on_step=seen.append
    )
    assert [round(progress.share, 3) for progress in seen] == [tenth / 10 for tenth in range(1, 10)]


def test_labels_out_of_range_are_refused():
    images, labels = quarters(6)
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(UserError, match="labels must be from 0 to 2"):
            training.train_classifier(images, wrong, TINY, steps=1)


def test_every_image_comes_once_in_each_round():
    drawn = training.order(10, 4, seed=3)
    rounds = np.concatenate([next(drawn) for _ in range(5)]).reshape(2, 10)
    assert (np.sort(rounds, axis=1) == np.arange(10)[None]).all()
    assert (rounds[0] != rounds[1]).any()
    assert len(next(training.order(3, 8, seed=0))) == 8  # more than there are


def changed(images, **amounts):
    """Half of the images, by the draw of this key, stay where they are."""
    still = dict.fromkeys(("shift", "zoom", "turn", "contrast"), 0.0) | {"mirror": False}
    return np.asarray(training.augment(jax.random.key(5), images, training.Augmentation(**(still | amounts))))


def test_images_are_moved_turned_and_zoomed_within_limits():
    noise = np.random.default_rng(0).uniform(0.2, 1, (64, 9, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(changed(noise), noise, atol=1e-5)
    mirrored = changed(noise, mirror=True)
    kept = np.abs(mirrored - noise).max(axis=(1, 2, 3)) < 1e-5
    flipped = np.abs(mirrored - noise[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert (kept ^ flipped).all() and kept.any() and flipped.any()
    gains = changed(noise, contrast=0.5) / noise
    still = np.abs(gains - 1).max(axis=(1, 2, 3)) < 1e-5
    assert 16 < still.sum() < 48
    assert np.ptp(gains, axis=(1, 2, 3)).max() < 1e-3 and 0.5 <= gains.min() < 0.8 < 1.2 < gains.max() <= 1.5
    # Of a slope everything can be read off: how steep, which way, how high in the middle.
    rows, columns = np.mgrid[:33, :33] - 16.0
    slope = np.repeat((0.02 * rows + 0.01 * columns).astype(np.float32)[None, :, :, None], 64, axis=0)
    slope = np.repeat(slope, 3, axis=-1)

    def read(**amounts):
        inner = changed(slope, **amounts)[:, 12:21, 12:21, 0]
        down, right = (np.diff(inner, axis=axis).mean(axis=(1, 2)) for axis in (1, 2))
        return np.hypot(down, right) / np.hypot(0.02, 0.01), np.arctan2(right, down), inner[:, 4, 4]

    steep, way, middle = read(turn=20.0)
    turned = np.rad2deg(way - np.arctan2(0.01, 0.02))
    assert np.abs(steep - 1).max() < 1e-3 and -20 <= turned.min() < -10 and 10 < turned.max() <= 20
    steep, way, middle = read(zoom=0.2)
    assert 0.8 <= steep.min() < 0.9 and 1.1 < steep.max() <= 1.2 and np.ptp(way) < 1e-3
    assert np.abs(middle).max() < 1e-4
    steep, way, middle = read(shift=0.1)
    most = 3.3 * 0.03
    assert np.abs(steep - 1).max() < 1e-3 and most / 3 < np.abs(middle).max() <= most


def test_the_file_gives_the_same_bits_back(tmp_path):
    params = random_params(TINY, (12, 10))
    made = classifier.save_classifier(
        tmp_path / "new" / "c.safetensors", TINY, params, size=(12, 10), about={"accuracy": 0.5}
    )
    again = classifier.load(tmp_path / "new" / "c.safetensors")
    assert again.about == {"accuracy": 0.5} and (again.height, again.width) == (12, 10)
    assert again.network == TINY and again.num_classes == 3 and again.name == "c.safetensors"
    assert again.sha256 == made.sha256 and len(made.sha256) == 64
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, params))
    assert again.protocol == "frechet_classifier"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_a_image_gives_the_same_in_any_batch_and_other_sizes_are_resized(monkeypatch):
    monkeypatch.setattr(classifier, "AT_ONCE", 4)
    one = classifier.TrainedClassifier("", "", TINY, random_params(TINY), 12, 12, {})
    images = np.random.default_rng(2).integers(0, 256, (7, 12, 12, 3)).astype(np.uint8)
    together = one.logits(images)
    assert together.shape == (7, 3) and together.dtype == np.float32
    alone = np.concatenate([one.logits(images[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)
    features, logits = TINY.apply({"params": one.params}, to_unit(images))
    np.testing.assert_allclose(one.features(images), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together, logits, rtol=1e-4, atol=1e-4)
    assert one.logits(images[:0]).shape == (0, 3) and one.features(images[:0]).shape == (0, 32)
    larger = np.random.default_rng(3).integers(0, 256, (2, 20, 31, 3)).astype(np.uint8)
    smaller = np.clip(resize_bicubic(to_unit(larger), 12, 12), -1, 1)
    np.testing.assert_allclose(
        one.logits(larger), TINY.apply({"params": one.params}, smaller)[1], rtol=1e-4, atol=1e-4
    )
    for wrong in (images.astype(np.float32), images[0], images[..., :1]):
        with pytest.raises(ValueError, match="uint8 images"):
            one.logits(wrong)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    classifier.save_classifier(path, TINY, random_params(TINY), size=(12, 12), about={})
    content = path.read_bytes()
    facts = {"network": {"num_classes": 3, "width": 4}, "height": 12, "width": 12, "about": {}}
    wrong = {
        "cannot be read as a classifier": content[:200],
        "is a safetensors file but no classifier": save(load(content)),
        "are not those of the network": save(
            load(content), {"format": classifier.FORMAT, "classifier": json.dumps(facts)}
        ),
        "cannot be read as": save(load(content), {"format": classifier.FORMAT, "classifier": "{}"}),
    }
    for sentence, bad in wrong.items():
        path.write_bytes(bad)
        with pytest.raises(UserError, match=sentence) as caught:
            classifier.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        classifier.load(tmp_path / "none.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        classifier.save_classifier(tmp_path / "file" / "c.safetensors", TINY, {}, size=(1, 1), about={})


def test_the_first_resolution_is_about_as_large_for_any_size():
    assert [training.patch_for(side, side) for side in (8, 16, 28, 32, 64, 112, 256)] == [1, 1, 2, 2, 4, 4, 8]
    assert training.patch_for(112, 88) == 4
