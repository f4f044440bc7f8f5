"""Classifiers by name, ONNX files, and top-k accuracy."""

from __future__ import annotations

import hashlib
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from sr3_jax.errors import UserError
from sr3_jax.features import onnx
from sr3_jax.features.classifiers import correct, load_classifier


def test_top_k_agrees_with_a_loop():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(200, 7)).astype(np.float32), random.integers(0, 7, 200)
    for top in (1, 3, 7):
        plain = []
        for row, label in zip(logits, labels, strict=True):
            greater = sum(1 for value in row if value > row[label])
            plain.append(greater < top)
        assert correct(logits, labels, top=top).tolist() == plain
    assert correct(logits, labels).mean() < correct(logits, labels, top=3).mean() < 1.0


def test_ties_count_for_one_class_only():
    assert correct(np.zeros((3, 3), np.float32), np.arange(3)).tolist() == [True, False, False]


def test_labels_or_logits_that_do_not_match_are_errors():
    logits = np.zeros((2, 3), np.float32)
    with pytest.raises(UserError, match=r"0 to 3.*3 classes"):
        correct(logits, np.array([0, 3]))
    with pytest.raises(UserError, match="-1"):
        correct(logits, np.array([0, -1]))
    with pytest.raises(UserError, match="not finite"):
        correct(logits + np.nan, np.array([0, 1]))
    with pytest.raises(ValueError, match="labels"):
        correct(logits, np.array([0]))


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("my_classifier", "my_broken_classifier"):
        sys.modules.pop(name, None)


def test_a_function_of_a_module_in_the_working_directory(working_directory):
    source = (
        "import numpy as np\n"
        "def brightest(images):\n    return images.astype(int).sum(axis=(1, 2))\n"
        "def single(images):\n    return images[:, 0, 0, 0]\n"
        "NUMBER = 3\n"
    )
    (working_directory / "my_classifier.py").write_text(source)
    found = load_classifier("my_classifier:brightest")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 1], images[1, ..., 2] = 255, 9
    assert found.logits(images).tolist() == [[0, 16 * 255, 0], [0, 0, 16 * 9]]
    assert found.logits(images).dtype == np.float32
    assert found.num_classes == 3 and found.name == "my_classifier:brightest"
    assert found.sha256 == hashlib.sha256(source.encode()).hexdigest()
    with pytest.raises(UserError, match=r"my_classifier:single.*\[B,K\].*uint8 \(2,\)"):
        load_classifier("my_classifier:single").logits(images)
    with pytest.raises(UserError, match=r"my_classifier:NUMBER.*int"):
        load_classifier("my_classifier:NUMBER")


def test_an_unknown_classifier_is_an_error(working_directory):
    (working_directory / "my_broken_classifier.py").write_text("import nothing_of_that_name\n")
    expected = {
        "no_such_module:function": "cannot be imported",
        "my_broken_classifier:function": "cannot be imported",
        "json:no_such_function": "cannot be imported",
        "resnet": "MODULE:FUNCTION",
        "a b:c": "MODULE:FUNCTION",
        "": "MODULE:FUNCTION",
        "none.safetensors": "cannot be read",
        "none.onnx": "cannot be read",
    }
    for spec, words in expected.items():
        with pytest.raises(UserError, match=words) as caught:
            load_classifier(spec)
        assert "\n" not in str(caught.value)


# A minimal writer of ONNX files, which are protocol buffers: fields of (number, content).


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(value):
    head = value & 127
    return bytes([head]) if value < 128 else bytes([head | 128]) + varint(value >> 7)


FLOAT, UINT8, INT64 = 1, 2, 7


def value_info(name, kind, shape):
    """ValueInfoProto: name 1, type 2 {tensor 1 {element 1, shape 2 {dim 1 {value 1 or name 2}}}}."""
    dims = b"".join(field(1, field(1 if isinstance(side, int) else 2, side)) for side in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))


def node(kind, inputs, output, attributes=b""):
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind) + attributes


def onnx_file(path, shape, *, kind=FLOAT, output=("batch", "values")):
    """A network whose logits are its input pixels, in the order of its layout."""
    minus_one = field(1, 2) + field(2, INT64) + field(8, "shape") + field(9, struct.pack("<2q", 0, -1))
    nodes = [node("Cast", ["images"], "floats", field(5, field(1, "to") + field(3, FLOAT) + field(20, 2)))]
    nodes += [node("Reshape", ["floats", "shape"], "logits")]
    graph = b"".join(field(1, one) for one in nodes) + field(2, "pixels") + field(5, minus_one)
    graph += field(11, value_info("images", kind, shape)) + field(12, value_info("logits", FLOAT, output))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 17)))
    return path


@pytest.fixture
def noise():
    pytest.importorskip("onnxruntime")
    return np.random.default_rng(0).integers(0, 256, (5, 12, 8, 3)).astype(np.uint8)


def test_an_onnx_file_of_any_batch_and_size(tmp_path, noise):
    path = onnx_file(tmp_path / "c.onnx", ["batch", 3, "height", "width"])
    found = load_classifier(str(path))
    wanted = (noise / 255.0).transpose(0, 3, 1, 2).reshape(5, -1)
    np.testing.assert_allclose(found.logits(noise), wanted, atol=1e-6)
    assert found.logits(noise).dtype == np.float32 and found.logits(noise[:0]).shape[0] == 0
    assert found.name == "c.onnx" and found.num_classes == 0
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_preprocessing_of_an_onnx_file(tmp_path, noise):
    path = onnx_file(tmp_path / "c.onnx", [2, 12, 8, 3], output=(2, 12 * 8 * 3))
    assert load_classifier(str(path)).num_classes == 288
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = {
        "unit": noise / 255.0,
        "signed": noise / 127.5 - 1,
        "levels": noise.astype(float),
        "imagenet": (noise / 255.0 - mean) / deviation,
    }
    for normalize, pixels in wanted.items():
        found = load_classifier(f"{path}?normalize={normalize}").logits(
            noise
        )  # batches of 2, the last one padded
        np.testing.assert_allclose(found, pixels.reshape(5, -1), rtol=1e-5, atol=1e-5)
    gray = onnx_file(tmp_path / "gray.onnx", ["batch", 1, 12, 8])
    luma = noise @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(load_classifier(str(gray)).logits(noise), luma.reshape(5, -1) / 255, atol=1e-5)
    levels = onnx_file(tmp_path / "levels.onnx", ["batch", 12, 8, 3], kind=UINT8)
    np.testing.assert_array_equal(load_classifier(str(levels)).logits(noise), noise.reshape(5, -1))


def test_resize_crop_and_fixed_input_sizes(tmp_path, noise):
    path = onnx_file(tmp_path / "c.onnx", ["batch", "height", "width", 3])
    cropped = load_classifier(f"{path}?crop=6&normalize=levels").logits(noise)
    np.testing.assert_array_equal(cropped, noise[:, 3:9, 1:7].reshape(5, -1))

    def pillow(image, side):
        planes = [
            Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        return np.clip(np.stack([np.asarray(plane) for plane in planes], axis=-1), 0, 255)

    resized = np.stack([pillow(image, 16) for image in noise])
    found = load_classifier(f"{path}?resize=16&crop=14&normalize=levels").logits(noise)
    np.testing.assert_allclose(found, resized[:, 1:15, 1:15].reshape(5, -1), atol=0.05)
    fixed = onnx_file(tmp_path / "fixed.onnx", ["batch", 16, 16, 3])
    found = load_classifier(f"{fixed}?normalize=levels").logits(noise)
    np.testing.assert_allclose(found, resized.reshape(5, -1), atol=0.05)


def test_invalid_onnx_files_and_options_are_errors(tmp_path, noise, monkeypatch):
    good = onnx_file(tmp_path / "good.onnx", ["batch", 3, 12, 8])
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(good.read_bytes()[:50])
    expected = {
        damaged: "not a valid ONNX file",
        onnx_file(tmp_path / "flat.onnx", ["batch", 3]): "input of images",
        onnx_file(tmp_path / "wide.onnx", ["batch", 4, 12, 8]): "1 or 3 channels",
        f"{good}?normalize=imagnet": "normalize=imagnet",
        f"{good}?normalise=imagenet": "normalise=imagenet.*normalize=",
        f"{good}?crop=0": "crop=0",
        f"{good}?crop": "crop=",
        f"{good}?size=224": "size=224",
        f"{onnx_file(tmp_path / 'gray.onnx', ['batch', 1, 12, 8])}?normalize=imagenet": "normalize=imagenet",
    }
    for spec, words in expected.items():
        with pytest.raises(UserError, match=words) as caught:
            load_classifier(str(spec))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"crop=10.*8x12"):
        load_classifier(f"{good}?crop=10").logits(noise)
    with pytest.raises(ValueError, match="uint8 images"):
        load_classifier(str(good)).logits(noise[0])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install.*onnx"):
        load_classifier(str(good))


def test_options_of_an_onnx_file():
    assert onnx.read_options("") == onnx.Preprocessing(resize=None, crop=None, normalize="unit")
    assert onnx.read_options("resize=256&crop=224&normalize=imagenet") == onnx.Preprocessing(
        256, 224, "imagenet"
    )
