"""The small classifier trained from scratch: its training, its file, its command."""

from __future__ import annotations

import contextlib
import itertools
import json
import types

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from experiments import train_classifier as training
from sr3_jax.cli import main as sr3
from sr3_jax.data.sources import open_source
from sr3_jax.errors import UserError
from sr3_jax.features import classifiers
from sr3_jax.image_ops import resize_bicubic, to_unit
from sr3_jax.nn.classifier import ClassifierNetwork

TINY = ClassifierNetwork(3, width=8, patch=2)


def random_params(network, size=(12, 12), seed=0):
    """Random weights; the initial ones include zeros."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: classifiers.init_params(network, size, key), jax.random.key(0))
    return jax.tree.map(lambda a: random.normal(0.0, 0.3, a.shape).astype(np.float32), shapes)


def quarters(count, side=12, seed=0):
    """Grayscale noise with one bright quarter of three, whose index is the label."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 120, (count, side, side, 3)).astype(np.uint8)
    half = side // 2
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * half :][:half, column * half :][:, :half] += 100
    return images, labels


def test_it_learns_and_a_seed_reproduces_the_weights():
    images, labels = quarters(60)
    augmentation = training.ClassifierAugmentation(mirror=False, contrast=0.2)
    seen = []

    def trained(seed, steps):
        return training.train_classifier(
            images, labels, TINY, steps=steps, batch_size=20, seed=seed, learning_rate=1e-2, augmentation=augmentation,
            on_step=seen.append,
        )  # fmt: skip

    others, truth = quarters(30, seed=1)
    one = classifiers.NetworkClassifier("", "", TINY, trained(0, 60), 12, 12, {})
    assert np.mean(one.logits(others).argmax(axis=1) == truth) == 1.0
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert seen[-1].loss < 0.7 * seen[0].loss and seen[-1].accuracy > 0.9
    assert all(0 <= progress.fraction < 1 for progress in seen)
    first, again, other = (jax.tree.leaves(trained(seed, 2)) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_minutes_stop_the_training(monkeypatch):
    clock = itertools.count(step=6.0)  # seconds: every reading of the clock takes a tenth of a minute
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    images, labels = quarters(20)
    seen = []
    training.train_classifier(
        images, labels, TINY, steps=1000, minutes=1.0, batch_size=20, on_step=seen.append
    )
    assert [round(progress.fraction, 3) for progress in seen] == [tenth / 10 for tenth in range(1, 10)]


def test_labels_out_of_range_are_errors():
    images, labels = quarters(6)
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(UserError, match="0 to 2"):
            training.train_classifier(images, wrong, TINY, steps=1)


def test_every_image_comes_once_per_epoch():
    batches = training.order(10, 4, seed=3)
    epochs = np.concatenate([next(batches) for _ in range(5)]).reshape(2, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)[None]).all()
    assert (epochs[0] != epochs[1]).any()
    assert len(next(training.order(3, 8, seed=0))) == 8  # more than there are


def changed(images, **amounts):
    """About half of the images are not changed."""
    still = dict.fromkeys(("shift", "zoom", "turn", "contrast"), 0.0) | {"mirror": False}
    return np.asarray(
        training.augment(jax.random.key(5), images, training.ClassifierAugmentation(**(still | amounts)))
    )


def test_augmentation_stays_within_its_limits():
    noise = np.random.default_rng(0).uniform(0.2, 1, (64, 9, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(changed(noise), noise, atol=1e-5)
    mirrored = changed(noise, mirror=True)
    unchanged = np.abs(mirrored - noise).max(axis=(1, 2, 3)) < 1e-5
    flipped = np.abs(mirrored - noise[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert (unchanged ^ flipped).all() and unchanged.any() and flipped.any()
    gains = changed(noise, contrast=0.5) / noise
    still = np.abs(gains - 1).max(axis=(1, 2, 3)) < 1e-5
    assert 16 < still.sum() < 48
    assert np.ptp(gains, axis=(1, 2, 3)).max() < 1e-3 and 0.5 <= gains.min() < 0.8 < 1.2 < gains.max() <= 1.5
    # A linear ramp shows all changes: by its slope, its direction and its middle value.
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


def test_the_file_preserves_the_weights_exactly(tmp_path):
    params = random_params(TINY, (12, 10))
    made = training.save_classifier(
        tmp_path / "new" / "c.safetensors", TINY, params, size=(12, 10), info={"accuracy": 0.5}
    )
    again = classifiers.load_network(tmp_path / "new" / "c.safetensors")
    assert again.info == {"accuracy": 0.5} and (again.height, again.width) == (12, 10)
    assert again.network == TINY and again.num_classes == 3 and again.name == "c.safetensors"
    assert again.sha256 == made.sha256 and len(made.sha256) == 64
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again.params, params))
    assert again.protocol == "frechet_classifier"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_logits_do_not_depend_on_the_batch_and_other_sizes_are_resized(monkeypatch):
    monkeypatch.setattr(classifiers, "BATCH", 4)
    one = classifiers.NetworkClassifier("", "", TINY, random_params(TINY), 12, 12, {})
    images = np.random.default_rng(2).integers(0, 256, (7, 12, 12, 3)).astype(np.uint8)
    together = one.logits(images)
    assert together.shape == (7, 3) and together.dtype == np.float32
    single = np.concatenate([one.logits(images[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-4)
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


def test_damaged_files_are_errors(tmp_path):
    path = tmp_path / "c.safetensors"
    training.save_classifier(path, TINY, random_params(TINY), size=(12, 12), info={})
    content = path.read_bytes()
    facts = {"network": {"num_classes": 3, "width": 4}, "height": 12, "width": 12, "about": {}}
    wrong = {
        "cannot be read as a classifier": content[:200],
        "is not a classifier": save(load(content)),
        "do not match": save(
            load(content), {"format": classifiers.NETWORK_FORMAT, "classifier": json.dumps(facts)}
        ),
        "cannot be read as": save(load(content), {"format": classifiers.NETWORK_FORMAT, "classifier": "{}"}),
    }
    for words, bad in wrong.items():
        path.write_bytes(bad)
        with pytest.raises(UserError, match=words) as caught:
            classifiers.load_network(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        classifiers.load_network(tmp_path / "none.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        training.save_classifier(tmp_path / "file" / "c.safetensors", TINY, {}, size=(1, 1), info={})


def test_the_patch_grows_with_the_image():
    assert [training.patch_for(side, side) for side in (8, 16, 28, 32, 64, 112, 256)] == [1, 1, 2, 2, 4, 4, 8]
    assert training.patch_for(112, 88) == 4


# ---- The command.


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """A data set of 8x8 images whose class is the brightness of their upper half."""
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for label, offset in (("dark", 0), ("light", 150)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(16):
            image = random.integers(0, 100, (8, 8, 3)).astype(np.uint8)
            image[:4] += offset
            Image.fromarray(image).save(tmp_path / "images" / label / f"{number}.png")
    assert sr3.main(["prepare", str(tmp_path / "images"), "--name=halves", "--test-count=12"]) == 0
    return tmp_path


def test_the_command_trains_and_saves_a_classifier(halves, capsys):
    file = halves / "halves.safetensors"
    command = ["--data=tfds:halves:train", "--eval-data=tfds:halves:test", "-o", str(file)]
    command += ["--steps=12", "--batch=10", "--width=4"]
    assert training.main(command) == 0
    printed = capsys.readouterr().out
    assert "tfds:halves:test" in printed and "100.00%" in printed
    found = classifiers.load_classifier(str(file))
    assert found.num_classes == 2 and found.sha256 in printed and (found.height, found.width) == (8, 8)
    assert found.info["accuracy"] == 1.0 and found.info["accuracy_by_class"] == {"0": 1.0, "1": 1.0}
    assert (found.info["data"], found.info["images"], found.info["seed"]) == ("tfds:halves:train", 20, 0)
    for item in (open_source("tfds:halves:test")[index] for index in range(12)):
        assert found.logits(item["image"][None]).argmax() == item["label"]
    assert training.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--steps=0", "--steps=", "--minutes=nan", "--seed=99999999999", "--augment=-1", "--width=1"]
)
def test_invalid_options_are_errors(option, tmp_path, capsys):
    assert training.main(["--data=photos:test", "-o", str(tmp_path / "c.safetensors"), option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_a_stopped_training_saves_nothing(halves, monkeypatch):
    monkeypatch.setattr(training, "stop_signals", lambda: contextlib.nullcontext(lambda: 143))
    with pytest.raises(SystemExit) as stopped:
        training.main(["--data=tfds:halves:train", "-o", str(halves / "c.safetensors"), "--steps=9"])
    assert stopped.value.code == 143 and not list(halves.glob("c.*"))
