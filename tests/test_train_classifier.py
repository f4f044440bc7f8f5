"""`sr3 train-classifier`: labelled images in, one file out, and its accuracy told."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from PIL import Image

from sr3_jax.cli.main import main
from sr3_jax.data.sources import Source, open_source
from sr3_jax.errors import UserError
from sr3_jax.features import training
from sr3_jax.features.recognition import load_classifier


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Images of 8x8: the class 'dark' or 'light' is that of their upper half."""
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    random = np.random.default_rng(0)
    for label, offset in (("dark", 0), ("light", 150)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(16):
            image = random.integers(0, 100, (8, 8, 3)).astype(np.uint8)
            image[:4] += offset
            Image.fromarray(image).save(tmp_path / "images" / label / f"{number}.png")
    assert main(["prepare", str(tmp_path / "images"), "--name=halves", "--test-count=12"]) == 0
    return tmp_path


def test_a_classifier_is_trained_kept_and_found_by_its_name(data, capsys):
    command = ["train-classifier", "--data=tfds:halves:train", "--eval-data=tfds:halves:test", "-o"]
    command += [str(data / "halves.safetensors"), "--steps=12", "--batch=10", "--width=4", "--augment=0.5"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "12 of 12 images of tfds:halves:test are recognised: 100.00%" in told.out
    assert "loss" in told.err
    found = load_classifier(str(data / "halves.safetensors"))
    assert found.num_classes == 2 and found.sha256 in told.out and (found.height, found.width) == (8, 8)
    assert found.about["accuracy"] == 1.0 and found.about["accuracy_by_class"] == {"0": 1.0, "1": 1.0}
    assert (found.about["data"], found.about["images"], found.about["seed"]) == ("tfds:halves:train", 20, 0)
    # Asked by hand, it says the same of each image.
    for item in (open_source("tfds:halves:test")[index] for index in range(12)):
        assert found.logits(item["image"][None]).argmax() == item["label"]
    capsys.readouterr()
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert load_classifier(str(data / "halves.safetensors")).sha256 == found.sha256


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data=tfds:halves:train", "-o", "c.npz"], "must end in .safetensors"),
        (["--data=tfds:halves:train", "-o", "c.safetensors", "--steps=0"], "--steps must be a whole number"),
        (["--data=tfds:halves:train", "-o", "c.safetensors", "--minutes=nan"], "--minutes must be a number"),
        (["--data=photos:test", "-o", "c.safetensors"], "photos:test has no labels"),
        (["--data=tfds:nothing:train", "-o", "c.safetensors"], "is not prepared"),
        (
            ["--data=tfds:halves:train", "-o", "c.safetensors", "--seed=99999999999"],
            "--seed must be a whole number, 0 to",
        ),
        (
            ["--data=tfds:halves:train", "-o", "c.safetensors", "--steps="],
            "--steps must be a whole number, 1 or more",
        ),
        (
            ["--data=tfds:halves:train", "-o", "c.safetensors", "--augment=-1"],
            "--augment must be a number, 0 or more",
        ),
        (
            ["--data=tfds:halves:train", "-o", "c.safetensors", "--features=alexnet", "--steps="],
            "leave out --steps",
        ),
        (
            ["--data=tfds:halves:train", "-o", "f.safetensors"],
            "output f.safetensors is a folder: name a file",
        ),
        (["--data=tfds:halves:train", "-o", "g/c.safetensors"], "is a file: name a folder"),
        (
            ["--data=tfds:halves:train[:2]", "-o", "c.safetensors"],
            "of one class alone: a classifier needs two",
        ),
        (
            ["--data=tfds:halves:train", "--eval-data=tfds:thirds:train", "-o", "c.safetensors"],
            "tfds:thirds:train has images of class 2, which tfds:halves:train has not: name others",
        ),
    ],
)
def test_mistakes_are_one_sentence(data, arguments, sentence, capsys, monkeypatch):
    monkeypatch.chdir(data)
    (data / "f.safetensors").mkdir()
    (data / "g").touch()
    for name in ("dark", "light", "mixed"):
        (data / "more" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(data / "more" / name / "0.png")
    assert main(["prepare", "more", "--name=thirds"]) == 0
    capsys.readouterr()
    assert main(["train-classifier", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and "\n" not in error and not list(data.glob("c.*"))


def test_a_training_that_is_stopped_says_that_nothing_is_kept(data, capsys, monkeypatch):
    polled = contextlib.nullcontext(lambda: 143)
    monkeypatch.setattr("sr3_jax.distributed.signals.stop_signals", lambda: polled)
    command = ["train-classifier", "--data=tfds:halves:train", "-o", str(data / "c.safetensors"), "--steps=9"]
    assert main(command) == 143
    assert "nothing is kept" in capsys.readouterr().err and not list(data.glob("c.*"))


def items(*shapes):
    def load(index):
        return {"image": np.full((*shapes[index], 3), index, np.uint8), "label": index}

    return Source("some", load, len(shapes))


def test_images_in_memory(monkeypatch):
    images, labels = training.labelled(items((4, 5), (4, 5), (4, 5)))
    assert images.shape == (3, 4, 5, 3) and labels.tolist() == [0, 1, 2] == images[:, 0, 0, 0].tolist()
    with pytest.raises(UserError, match="some has images of 5x4 and 4x5: bring them to one size"):
        training.labelled(items((4, 5), (5, 4)))
    monkeypatch.setattr(training, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="over 4 GiB"):
        training.labelled(items((4, 5), (4, 5)))
