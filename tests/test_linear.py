"""A linear layer on AlexNet: its features, its optimum by an independent solver, its file, its command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from PIL import Image
from safetensors.numpy import load_file, save_file

from sr3_jax.cli.main import main
from sr3_jax.errors import UserError
from sr3_jax.features import classifier, linear_probe
from sr3_jax.features.lpips import alexnet, load_lpips
from sr3_jax.features.recognition import load_classifier


def test_features_are_the_means_of_all_layers_whatever_the_batch(monkeypatch):
    lpips = load_lpips()
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 40, 3)).astype(np.uint8)
    layers = [np.asarray(layer) for layer in alexnet(lpips.weights, images.astype(np.float32))]
    plain = np.concatenate([layer.mean(axis=(1, 2)) for layer in layers], axis=1)
    assert plain.shape == (5, linear_probe.WIDTH)
    monkeypatch.setattr(linear_probe, "AT_ONCE", 2)
    np.testing.assert_allclose(linear_probe.features_of(lpips, images), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="31x31 pixels at least, got 40x30"):
        linear_probe.features_of(lpips, images[:, :30])
    with pytest.raises(ValueError, match="uint8 images"):
        linear_probe.features_of(lpips, images.astype(np.float32))


def test_the_head_is_at_the_optimum_of_an_independent_solver():
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = random.normal(size=(60, 4)).astype(np.float32) * [1, 5, 0.2, 1] + np.eye(4)[labels] + 3
    features[:, 3] = 7.0  # never tells anything
    head = linear_probe.train_head(features.astype(np.float32), labels, 3)
    x = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)

    def loss(flat):
        kernel, bias = flat[:12].reshape(4, 3), flat[12:]
        log_p = scipy.special.log_softmax(x @ kernel + bias, axis=1)
        return -log_p[np.arange(60), labels].mean() + linear_probe.DECAY * np.square(kernel).sum()

    best = scipy.optimize.minimize(
        loss, np.zeros(15), method="L-BFGS-B", options={"ftol": 1e-12, "maxiter": 5000}
    )
    ours = loss(np.concatenate([head.kernel.ravel(), head.bias]).astype(np.float64))
    assert abs(ours - best.fun) < 1e-6
    np.testing.assert_allclose(
        head.logits(features.astype(np.float32)), x @ head.kernel + head.bias, atol=1e-3
    )
    wanted = "labels must be from 0 to 2, got"
    for wrong, sentence in (([0, 3], wanted), ([-1, 0], wanted), ([], "no images to learn from")):
        with pytest.raises(UserError, match=sentence):
            linear_probe.train_head(features[: len(wrong)].astype(np.float32), np.array(wrong, int), 3)


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """Grey images with the same mean and spread: fine stripes lie across or stand upright."""
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for label in ("across", "upright"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            wave = 128 + 60 * np.sin((np.arange(36) + random.uniform(0, 9)) * 1.5)
            image = np.broadcast_to(wave[:, None] if label == "across" else wave, (36, 36))
            noisy = np.repeat((image + random.normal(0, 5, (36, 36)))[..., None], 3, axis=-1)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                tmp_path / f"images/{label}/{number}.png"
            )
    assert main(["prepare", str(tmp_path / "images"), "--name=stripes", "--test-count=8"]) == 0
    return tmp_path


def test_textures_are_told_apart_and_the_file_is_found_by_its_name(stripes, capsys):
    file = stripes / "stripes.safetensors"
    command = ["train-classifier", "--features=alexnet", "--data=tfds:stripes:train", "-o", str(file)]
    assert main([*command, "--eval-data=tfds:stripes:test"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8 images of tfds:stripes:test are recognised: 100.00%" in told
    found = load_classifier(str(file))
    assert isinstance(found, linear_probe.LinearClassifier)
    assert found.num_classes == 2 and found.sha256 in told and found.about["accuracy"] == 1.0
    for path in sorted((stripes / "images").rglob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        assert found.logits(image).argmax() == (path.parent.name == "upright")
    assert main([*command, "--overwrite", "--seed=3"]) == 2
    assert "leave out --seed" in capsys.readouterr().err
    assert (
        main(["train-classifier", "--features=vgg", "--data=tfds:stripes:train", "-o", "x.safetensors"]) == 2
    )
    assert "--features must be alexnet or left out, got 'vgg'" in capsys.readouterr().err


def test_damaged_files_and_other_networks_are_refused(stripes):
    file = stripes / "a.safetensors"
    assert main(["train-classifier", "--features=alexnet", "--data=tfds:stripes:train", "-o", str(file)]) == 0
    arrays = load_file(file)

    def again(arrays, **facts):
        about = json.dumps({"alexnet": load_lpips().sha256, "about": {}} | facts)
        save_file(arrays, file, {"format": linear_probe.FORMAT, "classifier": about})
        return load_classifier(str(file))

    assert again(arrays).num_classes == 2
    with pytest.raises(UserError, match="not those of a layer on AlexNet"):
        again(arrays | {"bias": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="cannot be read as a classifier"):
        again({name: array for name, array in arrays.items() if name != "bias"})
    with pytest.raises(UserError, match="another AlexNet"):
        again(arrays, alexnet="0" * 64)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="cannot be read as a classifier"):
        load_classifier(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        classifier.format_of(stripes / "none.safetensors")
