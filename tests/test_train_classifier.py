"""User errors of `sr3 train-classifier`, and labeled images in memory."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sr3_jax.cli.main import main
from sr3_jax.data import sources
from sr3_jax.data.sources import Source, load_labeled
from sr3_jax.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets of two and of three classes, with the path of their data dir."""
    folder = tmp_path_factory.mktemp("data")
    for name, labels in (("two", ("dark", "light")), ("three", ("dark", "light", "mixed"))):
        for label in labels:
            (folder / name / label).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / label / f"{number}.png")
        assert main(["prepare", str(folder / name), f"--name={name}", f"--data-dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data=tfds:two:train", "-o", "c.npz"], ("c.npz", ".safetensors")),
        (["--data=tfds:two:train", "-o", "f.safetensors"], ("f.safetensors", "folder")),
        (["--data=tfds:two:train", "-o", "g/c.safetensors"], ("g", "folder")),
        (["--data=photos:test", "-o", "c.safetensors"], ("photos:test", "labels")),
        (["--data=tfds:nothing:train", "-o", "c.safetensors"], ("nothing", "sr3 prepare")),
        (["--data=tfds:two:train[:1]", "-o", "c.safetensors"], ("tfds:two:train[:1]", "one class")),
        (
            ["--data=tfds:two:train", "--eval-data=tfds:three:train", "-o", "c.safetensors"],
            ("tfds:three:train", "class 2", "tfds:two:train"),
        ),
        (["--data=tfds:two:train", "-o", "c.safetensors"], ("31x31", "8x8")),
        *(
            (
                ["--data=tfds:two:train", "-o", "c.safetensors", option],
                (option.partition("=")[0], "experiments"),
            )
            for option in ("--features=alexnet", "--steps=3", "--seed=0", "--width=", "--no-mirror")
        ),
    ],
)
def test_user_errors_are_one_line(data, tmp_path, arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("SR3_DATA_DIR", str(data))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.safetensors").mkdir()
    (tmp_path / "g").touch()
    assert main(["train-classifier", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert all(word in error for word in words) and "\n" not in error and not list(tmp_path.glob("c.*"))


def items(*shapes):
    def load(index):
        return {"image": np.full((*shapes[index], 3), index, np.uint8), "label": index}

    return Source("some", load, len(shapes))


def test_labeled_images_in_memory(monkeypatch):
    images, labels = load_labeled(items((4, 5), (4, 5), (4, 5)))
    assert images.shape == (3, 4, 5, 3) and labels.tolist() == [0, 1, 2] == images[:, 0, 0, 0].tolist()
    with pytest.raises(UserError, match=r"some.*5x4 and 4x5"):
        load_labeled(items((4, 5), (5, 4)))
    monkeypatch.setattr(sources, "MAX_IN_MEMORY", 100)
    with pytest.raises(UserError, match=r"some.*4 GiB"):
        load_labeled(items((4, 5), (4, 5)))
