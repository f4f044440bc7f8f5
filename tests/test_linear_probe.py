"""The linear probe on AlexNet: features, the optimum by an independent solver, its file, `sr3 train-classifier`."""

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
from sr3_jax.features import classifier_file, linear_probe
from sr3_jax.features.classifiers import load_classifier
from sr3_jax.features.lpips import alexnet, load_lpips


def test_features_are_the_means_of_all_layers_for_any_batch_size(monkeypatch):
    lpips = load_lpips()
    images = np.random.default_rng(0).integers(0, 256, (5, 33, 40, 3)).astype(np.uint8)
    layers = [np.asarray(layer) for layer in alexnet(lpips.weights, images.astype(np.float32))]
    plain = np.concatenate([layer.mean(axis=(1, 2)) for layer in layers], axis=1)
    assert plain.shape == (5, linear_probe.WIDTH)
    monkeypatch.setattr(linear_probe, "BATCH", 2)
    np.testing.assert_allclose(linear_probe.features_of(lpips, images), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"31x31.*40x30"):
        linear_probe.features_of(lpips, images[:, :30])
    with pytest.raises(ValueError, match="uint8 images"):
        linear_probe.features_of(lpips, images.astype(np.float32))


def test_the_head_is_at_the_optimum_of_an_independent_solver():
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = random.normal(size=(60, 4)).astype(np.float32) * [1, 5, 0.2, 1] + np.eye(4)[labels] + 3
    features[:, 3] = 7.0  # constant
    head = linear_probe.train_head(features.astype(np.float32), labels, 3)
    x = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)

    def loss(flat):
        kernel, bias = flat[:12].reshape(4, 3), flat[12:]
        log_p = scipy.special.log_softmax(x @ kernel + bias, axis=1)
        return -log_p[np.arange(60), labels].mean() + linear_probe.WEIGHT_DECAY * np.square(kernel).sum()

    best = scipy.optimize.minimize(
        loss, np.zeros(15), method="L-BFGS-B", options={"ftol": 1e-12, "maxiter": 5000}
    )
    ours = loss(np.concatenate([head.kernel.ravel(), head.bias]).astype(np.float64))
    assert abs(ours - best.fun) < 1e-6
    np.testing.assert_allclose(
        head.logits(features.astype(np.float32)), x @ head.kernel + head.bias, atol=1e-3
    )
    for wrong, words in (([0, 3], "0 to 3"), ([-1, 0], "-1 to 0"), ([], "no images")):
        with pytest.raises(UserError, match=words):
            linear_probe.train_head(features[: len(wrong)].astype(np.float32), np.array(wrong, int), 3)


@pytest.fixture
def stripes(tmp_path, monkeypatch):
    """Grayscale images with the same mean and variance: the class is the direction of fine stripes."""
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for label in ("horizontal", "vertical"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            wave = 128 + 60 * np.sin((np.arange(36) + random.uniform(0, 9)) * 1.5)
            image = np.broadcast_to(wave[:, None] if label == "horizontal" else wave, (36, 36))
            noisy = np.repeat((image + random.normal(0, 5, (36, 36)))[..., None], 3, axis=-1)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                tmp_path / f"images/{label}/{number}.png"
            )
    assert main(["prepare", str(tmp_path / "images"), "--name=stripes", "--test-count=8"]) == 0
    return tmp_path


def test_train_classifier_learns_textures_and_its_file_is_loaded(stripes, capsys):
    file = stripes / "stripes.safetensors"
    command = ["train-classifier", "--data=tfds:stripes:train", "-o", str(file)]
    assert main([*command, "--eval-data=tfds:stripes:test"]) == 0
    printed = capsys.readouterr().out
    assert "tfds:stripes:test" in printed and "100.00%" in printed
    found = load_classifier(str(file))
    assert isinstance(found, linear_probe.LinearProbe)
    assert found.num_classes == 2 and found.sha256 in printed and found.info["accuracy"] == 1.0
    for path in sorted((stripes / "images").rglob("*.png")):
        image = np.asarray(Image.open(path).convert("RGB"))[None]
        assert found.logits(image).argmax() == (path.parent.name == "vertical")
    assert main(command) == 2
    assert str(file) in (error := capsys.readouterr().err) and "--overwrite" in error
    assert load_classifier(str(file)).sha256 == found.sha256


def test_damaged_files_and_other_networks_are_errors(stripes):
    file = stripes / "a.safetensors"
    assert main(["train-classifier", "--data=tfds:stripes:train", "-o", str(file)]) == 0
    arrays = load_file(file)

    def again(arrays, **facts):
        stored = json.dumps({"alexnet": load_lpips().sha256, "about": {}} | facts)
        save_file(arrays, file, {"format": linear_probe.FORMAT, "classifier": stored})
        return load_classifier(str(file))

    assert again(arrays).num_classes == 2
    with pytest.raises(UserError, match="do not match"):
        again(arrays | {"bias": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="cannot be read as a classifier"):
        again({name: array for name, array in arrays.items() if name != "bias"})
    with pytest.raises(UserError, match="AlexNet weights"):
        again(arrays, alexnet="0" * 64)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="cannot be read as a classifier"):
        load_classifier(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        classifier_file.classifier_format(stripes / "none.safetensors")
