"""A data set by name: random access to photographs as uint8 arrays, decoded ones kept in memory.

Shape legend: H height, W width.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sr3_jax.data import store
from sr3_jax.data.folders import shown, walk
from sr3_jax.errors import UserError
from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, ImageError, read_rgb, read_size

_log = logging.getLogger("sr3_jax")
_NAMES = "photos:train, photos:test, tfds:NAME[/CONFIG]:SPLIT or folder:PATH"
_LISTED = 100  # unreadable files named in one message; the rest are counted


class ImageTooSmallError(ImageError):
    """An image whose short side is under the least that was asked for."""


class Source:
    """Random access to a data set: source[i] is {'image': uint8 [H,W,3], 'label': int if it has labels}.

    Arrays are read-only and shared. Decoded images stay in memory until `cache_mb` are full, and then those
    stay: in epochs of random order that serves more reads than dropping the oldest. Thread-safe.
    Reading raises ImageError ('NAME: reason') for an image that can't be used.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[int], dict[str, Any]],
        count: int,
        *,
        describe: Callable[[int], str] = "record {}".format,
        file_name: Callable[[int], str] = "{:05d}".format,
        min_side: int = 0,
        cache_mb: int = 1024,
        num_classes: int | None = None,
    ) -> None:
        self.name = name
        self.num_classes = num_classes  # of the labels, where the data set says it
        self.describe = describe
        self.file_name = file_name  # of an image's file where it is known, else its number
        self._load = load
        self._count = count
        self._min_side = min_side
        self._free = cache_mb * 2**20
        self._kept: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"{self.name} has {self._count} images, no number {index}")
        kept = self._kept.get(index)
        if kept is not None:
            return dict(kept)
        try:
            item = self._load(index)
            check_side(item["image"].shape[:2], self._min_side)
        except ImageError as error:
            raise type(error)(f"{self.describe(index)}: {error}") from error
        item["image"].flags.writeable = False
        with self._lock:
            if index not in self._kept and item["image"].nbytes <= self._free:
                self._free -= item["image"].nbytes
                self._kept[index] = item
        return dict(item)


def open_source(name: str, *, min_side: int = 0, cache_mb: int = 1024) -> Source:
    """Open a data set: `photos:train`, `photos:test`, `tfds:NAME[/CONFIG][:VERSION]:SPLIT` or `folder:PATH`.

    Args:
      min_side: least short side in pixels. Smaller images of a folder are counted and left out here; in a
        TFDS data set reading one raises ImageTooSmallError, since looking at each first would take too long.
      cache_mb: memory for decoded images.

    Raises:
      UserError: there is no such data set or split, it has no images, or none can be used.
    """
    kind, _, rest = name.partition(":")
    if kind == "photos" and rest in ("train", "test"):
        return _read_tfds(name, _photos(), rest, min_side, cache_mb)
    if kind == "tfds" and rest:
        return _open_tfds(name, rest, min_side, cache_mb)
    if kind == "folder" and rest:
        return _open_folder(name, Path(rest).expanduser(), min_side, cache_mb)
    raise UserError(f"no data source is called '{shown(name)}': use {_NAMES}")


def squares(source: Source, side: int, *, cache_mb: int = 1024) -> Source:
    """The largest centre square of each image, area-resampled to `side` pixels: the paper's ImageNet (section 3).

    Open `source` with cache_mb=0, so that only the squares are kept in memory.
    """

    def load(index: int) -> dict[str, Any]:
        item = source[index]
        height, width = item["image"].shape[:2]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        image = Image.fromarray(item["image"][top : top + short, left : left + short])
        return item | {"image": np.array(image.resize((side, side), Image.Resampling.BOX))}

    def describe(index: int) -> str:
        return source.describe(index)

    return Source(source.name, load, len(source), describe=describe, cache_mb=cache_mb)


def check_side(size: tuple[int, int], min_side: int) -> None:
    """Raises ImageTooSmallError if the short side of a (height, width) is under `min_side`."""
    if min(size) < min_side:
        raise ImageTooSmallError(f"is {size[1]}x{size[0]} pixels, with a short side under {min_side}")


def _open_tfds(name: str, rest: str, min_side: int, cache_mb: int) -> Source:
    match = re.fullmatch(r"([\w/.-]+)(?::(\d+\.\d+\.\d+))?:([^:/]*(?:\[[^/]*\])?[^:/]*)", rest)
    if match is None:
        raise UserError(
            f"'{shown(name)}' does not name a data set and a split: write tfds:NAME[/CONFIG]:SPLIT"
        )
    data_set, version, split = match.groups()
    return _read_tfds(name, store.require(data_set, version=version), split, min_side, cache_mb)


def _photos() -> Any:
    """The folder of the default data set, prepared if this is its first use."""
    from sr3_jax.data.photos.builder import Sr3Photos

    version, where = str(Sr3Photos.VERSION), store.data_dir()
    found = store.find(Sr3Photos.name, version=version, where=[str(where)])
    return found or store.build(Sr3Photos, where)


def _read_tfds(name: str, folder: Any, split: str, min_side: int, cache_mb: int) -> Source:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    features = builder.info.features
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in names:
        raise UserError(
            f"the data set of '{name}' has no feature 'image' among {names}: use another data set"
        )
    wanted = {"image": features["image"]}
    encoded = isinstance(wanted["image"], tfds.features.Image) and wanted["image"].np_dtype != np.float32
    if not encoded and not _is_array_image(wanted["image"]):
        raise UserError(
            f"the 'image' of '{name}' is {wanted['image']}, not of 8 bits a channel: use another data set"
        )
    if "label" in names and _is_class(features["label"]):
        wanted["label"] = features["label"]
    splits = store.quoted(builder.info.splits)
    try:
        # Raw, so that no other feature (masks, boxes) is decoded; the wanted ones are parsed below.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"the data set of '{name}' is stored as {builder.info.file_format.value}, without random access: "
            "run `tfds build` with --file_format=array_record, or `sr3 prepare` on its images"
        ) from error
    except (ValueError, KeyError) as error:
        sentence = f"the data set of '{name}' has no split '{split}', or nothing in it: use one of {splits}"
        raise UserError(sentence) from error
    parser = tfds.features.FeaturesDict(wanted)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None

    known: dict[str, Any] = {}
    if "label" in wanted:
        known["num_classes"] = getattr(features["label"], "num_classes", None)
    if "file_name" in names and isinstance(features["file_name"], tfds.features.Text):
        namer = tfds.features.FeaturesDict({"file_name": features["file_name"]})

        def file_name(index: int) -> str:
            return namer.deserialize_example_np(records[index])["file_name"].decode("utf-8", "replace")

        known["file_name"] = file_name

    def load(index: int) -> dict[str, Any]:
        example = parser.deserialize_example_np(records[index], decoders=decoders)
        image = example["image"]
        if encoded:
            if min_side:
                check_side(read_size(image), min_side)  # the header is enough to tell
            image = read_rgb(image)
        item = {"image": _three_channels(image)}
        return item | {"label": int(example["label"])} if "label" in wanted else item

    return Source(name, load, len(records), min_side=min_side, cache_mb=cache_mb, **known)


def _is_array_image(feature: Any) -> bool:
    shape = getattr(feature, "shape", None)
    if shape is None or feature.np_dtype != np.uint8:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))


def _is_class(feature: Any) -> bool:
    return getattr(feature, "shape", None) == () and np.issubdtype(feature.np_dtype, np.integer)


def _three_channels(image: np.ndarray) -> np.ndarray:
    image = image[:, :, None] if image.ndim == 2 else image
    return np.ascontiguousarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3])


@dataclass(frozen=True)
class Scan:
    """What a folder holds: images whose headers are good, in order, and (file, reason) for what is not."""

    images: list[Path]
    sizes: list[tuple[int, int]]  # (height, width) of each image
    rejected: list[tuple[Path, str]]


def scan_folder(root: Path, *, threads: int = 16) -> Scan:
    """Read the header of every file under `root`, as `folders.walk` finds them.

    Raises:
      UserError: `root` is no folder, or can't be listed.
    """
    files, rejected = walk(root)

    def look(path: Path) -> tuple[int, int] | str:
        try:
            return read_size(path)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        looks = list(pool.map(look, files))
    good = [(path, size) for path, size in zip(files, looks, strict=True) if not isinstance(size, str)]
    bad = [(path, reason) for path, reason in zip(files, looks, strict=True) if isinstance(reason, str)]
    return Scan([path for path, _ in good], [size for _, size in good], rejected + bad)


def _open_folder(name: str, root: Path, min_side: int, cache_mb: int) -> Source:
    scan = scan_folder(root)
    paths = [path for path, size in zip(scan.images, scan.sizes, strict=True) if min(size) >= min_side]
    bad, small = len(scan.rejected), len(scan.images) - len(paths)
    if bad:
        listed = [f"  {shown(path)}: {reason}" for path, reason in scan.rejected[:_LISTED]]
        listed += [f"  and {bad - _LISTED} more"] if bad > _LISTED else []
        _log.warning("%d left out of %s:\n%s", bad, shown(name), "\n".join(listed))
    if small:
        told = f"{small} of {len(scan.images)} images of {shown(name)}"
        _log.warning("%s left out: their short side is under %d pixels", told, min_side)
    if not paths:
        raise UserError(
            f"'{shown(root)}' holds no image that can be used ({bad} could not be read, {small} are under "
            f"{min_side} pixels): put images there ({' '.join(sorted(IMAGE_SUFFIXES))}), or crop smaller"
        )
    return Source(
        name,
        lambda index: {"image": read_rgb(paths[index])},
        len(paths),
        describe=lambda index: shown(paths[index]),
        file_name=lambda index: shown(paths[index].name),
        min_side=min_side,
        cache_mb=cache_mb,
    )
