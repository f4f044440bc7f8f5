"""Data sources by name: random access to images as uint8 arrays, with a cache of decoded images in memory.

Shape legend: H height, W width.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sr3_jax.data import store
from sr3_jax.data.matching import is_low_res, match_files, named
from sr3_jax.errors import UserError
from sr3_jax.files import parse_json
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, ImageError, UnreadableError, read_rgb, read_size
from sr3_jax.image_io.inputs import walk
from sr3_jax.storage import as_path

_log = logging.getLogger("sr3_jax")
NAMES = (
    "photos:train, photos:test, tfds:NAME[/CONFIG]:SPLIT, folder:PATH, pairs:LR_DIR:HR_DIR or "
    "synthetic:COUNTxHEIGHTxWIDTH[:CLASSES]"
)
MAX_IN_MEMORY = 4 * 2**30  # bytes
_LARGEST_SYNTHETIC = 64_000_000  # pixels
_LISTED = 100  # unreadable files named in one message; others are only counted
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 14.5)
_PERMANENT = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)  # when a folder is opened


class ImageTooSmallError(ImageError):
    """An image whose short side is below the required minimum."""


class DataUnavailable(UserError):
    """Data cannot be read, although nothing says that it is damaged. Trying again later may help."""

    exit_code = 1  # launchers restart a job that exits with it


class NoImages(UserError):
    """A folder is missing or has no usable image, which is also what a lost mount looks like."""


def retried(read: Callable[[], Any], what: str, *, permanent: Collection[int] = ()) -> Any:
    """The result of `read`, which is tried again for half a minute if the operating system cannot read the data.

    An error of storage is not damage: another image in place of this one would make a different run.

    Args:
        read: may raise an UnreadableError; other errors are not retried.
        what: the file or record, for the error.
        permanent: error numbers for which there is no point in waiting.

    Raises:
        DataUnavailable: it cannot be read after half a minute.
        UnreadableError: with an error number in `permanent`.
    """
    for delay in (*RETRY_SECONDS, None):
        try:
            return read()
        except UnreadableError as error:
            if error.errno in permanent:
                raise
            if delay is None:
                raise DataUnavailable(
                    f"{what} cannot be read ({error}): check that its storage is connected, and run the same command "
                    "again"
                ) from error
            if delay == RETRY_SECONDS[0]:
                _log.warning("%s cannot be read (%s): trying again", what, error)
            time.sleep(delay)


class Source:
    """Random access to a data set: source[i] is {'image': uint8 [H,W,3], 'label': int if it has labels}.

    Pairs also have 'low_res', uint8 [H/scale,W/scale,3]. Arrays are read-only and shared. Decoded images are cached
    until `cache_mb` is used up, and never evicted: for epochs in random order this has more hits than evicting the
    oldest. Thread-safe. Reading an unusable image raises ImageError ('NAME: reason'), and one that the operating system
    cannot read for half a minute DataUnavailable.
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
        scale: int | None = None,
    ) -> None:
        self.name = name
        self.scale = scale  # of the low-res images that the data set has; None if it has none
        self.num_classes = num_classes  # of the labels, where the data set declares it
        self.describe = describe
        self.file_name = file_name  # the image's path in its folder where known, else its number
        self._load = load
        self._count = count
        self._min_side = min_side
        self._free = cache_mb * 2**20
        self._cache: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"{self.name} has {self._count} images, so image {index} does not exist")
        cached = self._cache.get(index)
        if cached is not None:
            return dict(cached)
        try:
            item = retried(lambda: self._load(index), self.describe(index))
            check_side(item["image"].shape[:2], self._min_side)
        except ImageError as error:
            raise type(error)(f"{self.describe(index)}: {error}") from error
        images = [item[name] for name in ("image", "low_res") if name in item]
        for image in images:
            image.flags.writeable = False
        size = sum(image.nbytes for image in images)
        with self._lock:
            if index not in self._cache and size <= self._free:
                self._free -= size
                self._cache[index] = item
        return dict(item)


def open_source(name: str, *, min_side: int = 0, cache_mb: int = 1024, scale: int | None = None) -> Source:
    """Open a data set, named in one of these ways.

    - `photos:train`, `photos:test`: the bundled photographs.
    - `tfds:NAME[/CONFIG][:VERSION]:SPLIT`: a TFDS data set.
    - `folder:PATH`: the images of a folder, or of a bucket, gs://BUCKET/PATH.
    - `pairs:LR_DIR:HR_DIR`: low-res and high-res images of two folders, matched by name (`sr3_jax.data.matching`).
    - `synthetic:COUNTxHEIGHTxWIDTH[:CLASSES]`: smooth random images, made on the host, with labels if CLASSES is given:
      for measurements without data.

    Args:
      min_side: minimum short side in pixels. Smaller images of a folder are skipped with a warning; in a TFDS data set
        reading one raises ImageTooSmallError, since checking every image first would take too long.
      cache_mb: memory for decoded images.
      scale: that pairs must have; None for that of the first pair.

    Raises:
      UserError: the data set or split does not exist, or has no usable image; images have no partner, or one of another
        size.
    """
    kind, _, rest = name.partition(":")
    if kind == "photos" and rest in ("train", "test"):
        return _read_tfds(name, _photos(), rest, min_side, cache_mb)
    if kind == "tfds" and rest:
        return _open_tfds(name, rest, min_side, cache_mb)
    if kind == "folder" and rest:
        return _open_folder(name, as_path(os.path.expanduser(rest)), min_side, cache_mb)
    if kind == "pairs" and len(parts := re.split(r":(?!//)", rest)) == 2 and all(parts):
        low_res, high_res = (as_path(os.path.expanduser(path)) for path in parts)
        return _open_pairs(name, low_res, high_res, scale=scale, min_side=min_side, cache_mb=cache_mb)
    if kind == "synthetic":
        return _open_synthetic(name, rest, min_side, cache_mb)
    raise UserError(f"unknown data source '{printable(name)}': use {NAMES}")


def squares(source: Source, side: int, *, cache_mb: int = 1024) -> Source:
    """The largest center square of each image, area-resampled to `side` pixels: the paper's ImageNet protocol.

    Open `source` with cache_mb=0, so that only the squares are cached.

    Raises:
        UserError: the source has low-res images, which cannot be resampled with the others.
    """
    if source.scale is not None:
        raise UserError(f"{source.name} has low-res images, which need config.data.framing=crop, got square")

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


def load_labeled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """A whole labeled data set in memory: images uint8 [N,H,W,3] and labels int32 [N]. Open it with cache_mb=0.

    Raises:
        UserError: it has no labels, images of different sizes, or more than 4 GiB of images.
    """
    images, labels = np.zeros((0, 0, 0, 3), np.uint8), np.zeros(len(source), np.int32)
    for index in range(len(source)):
        item = source[index]
        image = item["image"]
        if "label" not in item:
            raise UserError(f"{source.name} has no labels: use a data set with one subfolder per class")
        if index == 0:
            if image.nbytes * len(source) > MAX_IN_MEMORY:
                raise UserError(
                    f"{source.name} has over 4 GiB of images: use a part of it, as in SPLIT[:10000]"
                )
            images = np.zeros((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (images.shape[1:], image.shape))
            raise UserError(f"{source.name} has images of {sizes}: resize them to one size first")
        images[index], labels[index] = image, item["label"]
    return images, labels


def check_side(size: tuple[int, int], min_side: int) -> None:
    """Raise ImageTooSmallError if the short side of (height, width) is below `min_side`."""
    if min(size) < min_side:
        raise ImageTooSmallError(f"is {size[1]}x{size[0]} pixels; the short side must be at least {min_side}")


def _open_tfds(name: str, rest: str, min_side: int, cache_mb: int) -> Source:
    match = re.fullmatch(r"([\w/.-]+)(?::(\d+\.\d+\.\d+))?:([^:/]*(?:\[[^/]*\])?[^:/]*)", rest)
    if match is None:
        raise UserError(f"'{printable(name)}' is not a data set with a split: use tfds:NAME[/CONFIG]:SPLIT")
    data_set, version, split = match.groups()
    return _read_tfds(name, store.require(data_set, version=version), split, min_side, cache_mb)


def _photos() -> Any:
    """The folder of the default data set, prepared on first use."""
    from sr3_jax.data.photos.builder import Sr3Photos

    version, where = str(Sr3Photos.VERSION), store.data_dir()
    found = store.find(Sr3Photos.name, version=version, where=[str(where)])
    return found or store.build(Sr3Photos, where)


def _check_features(path: Any, name: str) -> None:
    """Refuse a data set with features that are not TFDS's own: TFDS imports any module that this file names."""
    try:
        pending = [parse_json(path.read_text())]
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{printable(name)}' is damaged (features.json: {error}): prepare it again"
        ) from error
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            keys = ["pythonClassName", "python_class_name", *(["type"] if "content" in value else [])]
            for used in (str(value[key]) for key in keys if key in value):
                if not used.startswith("tensorflow_datasets.core.features."):
                    raise UserError(
                        f"'{printable(name)}' needs the feature {printable(used)}, which is not TFDS's own: use "
                        "another data set, or `sr3 prepare` on its images"
                    )


def _read_tfds(name: str, folder: Any, split: str, min_side: int, cache_mb: int) -> Source:
    import tensorflow_datasets as tfds

    _check_features(folder / "features.json", name)
    builder = tfds.builder_from_directory(str(folder))
    features = builder.info.features
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in names:
        raise UserError(f"'{name}' has no feature 'image', only {names}: use another data set")
    wanted = {"image": features["image"]}
    encoded = isinstance(wanted["image"], tfds.features.Image) and wanted["image"].np_dtype != np.float32
    if not encoded and not _is_array_image(wanted["image"]):
        raise UserError(
            f"the feature 'image' of '{name}' is {wanted['image']}, not 8 bits per channel: use another data set"
        )
    if "label" in names and _is_class(features["label"]):
        wanted["label"] = features["label"]
    splits = store.quoted(builder.info.splits)
    try:
        # Raw bytes: only the features used are decoded below, not masks or boxes.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
    except NotImplementedError as error:
        raise UserError(
            f"'{name}' is stored as {builder.info.file_format.value}, which has no random access: run `tfds build` "
            "with --file_format=array_record, or `sr3 prepare` on its images"
        ) from error
    except (ValueError, KeyError) as error:
        sentence = f"'{name}' has no split '{split}', or it is empty: use one of {splits}"
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
        try:
            record = records[index]
        except (OSError, RuntimeError, ValueError) as error:  # ArrayRecord gives no error numbers
            raise UnreadableError(f"of {folder}: {error}", 0) from error
        example = parser.deserialize_example_np(record, decoders=decoders)
        image = example["image"]
        if encoded:
            if min_side:
                check_side(read_size(image), min_side)  # from the header, without decoding
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
    """The files of a folder: images with valid headers, sorted by path, and (file, reason) for all others."""

    images: list[Path]
    sizes: list[tuple[int, int]]  # (height, width) of each image
    rejected: list[tuple[Path, str]]


def scan_folder(root: Path, *, threads: int = 16) -> Scan:
    """Read the header of every file under `root`, hidden files excepted.

    Raises:
      NoImages: `root` is not a folder.
      UserError: it cannot be listed.
      DataUnavailable: a file cannot be read because of its storage.
    """
    if not root.is_dir():
        raise NoImages(f"'{printable(root)}' is not a folder: use a folder of images")
    files, rejected = walk(root)
    if any(folder == root for folder, _ in rejected):
        raise UserError(
            f"folder '{printable(root)}' cannot be listed ({rejected[0][1]}): change its permissions"
        )
    files.sort(key=os.fsencode)  # the same order on every machine, for any name

    def look(path: Path) -> tuple[int, int] | str:
        try:
            return retried(lambda: read_size(path), printable(path), permanent=_PERMANENT)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool:
        looks = list(pool.map(look, files))
    good = [(path, size) for path, size in zip(files, looks, strict=True) if not isinstance(size, str)]
    bad = [(path, reason) for path, reason in zip(files, looks, strict=True) if isinstance(reason, str)]
    return Scan([path for path, _ in good], [size for _, size in good], rejected + bad)


def _open_folder(name: str, root: Path, min_side: int, cache_mb: int) -> Source:
    scan = scan_folder(root)
    paths = _usable(name, root, scan, min_side)
    return Source(
        name,
        lambda index: {"image": read_rgb(paths[index])},
        len(paths),
        describe=lambda index: printable(paths[index]),
        file_name=lambda index: printable(paths[index].relative_to(root)),
        min_side=min_side,
        cache_mb=cache_mb,
    )


def _usable(name: str, root: Path, scan: Scan, min_side: int) -> list[Path]:
    """The images of a folder that are large enough; logs the others. UserError if there are none."""
    paths = [path for path, size in zip(scan.images, scan.sizes, strict=True) if min(size) >= min_side]
    bad, small = len(scan.rejected), len(scan.images) - len(paths)
    if bad:
        listed = [f"  {printable(path)}: {reason}" for path, reason in scan.rejected[:_LISTED]]
        listed += [f"  and {bad - _LISTED} more"] if bad > _LISTED else []
        _log.warning("skipped %d files of %s:\n%s", bad, printable(name), "\n".join(listed))
    if small:
        share = f"{small} of {len(scan.images)} images of {printable(name)}"
        _log.warning("skipped %s: their short side is under %d pixels", share, min_side)
    if not scan.images and not bad:
        raise NoImages(f"'{printable(root)}' is empty: add images, or check that its storage is connected")
    if not paths:
        raise UserError(
            f"'{printable(root)}' has no usable image ({bad} could not be read, {small} are under {min_side} pixels): "
            f"add images ({' '.join(sorted(IMAGE_SUFFIXES))}) or use a smaller crop"
        )
    return paths


# ---- Pairs


def _open_pairs(
    name: str, low_res: Path, high_res: Path, *, scale: int | None, min_side: int, cache_mb: int
) -> Source:
    scans = [scan_folder(root) for root in (low_res, high_res)]
    sizes = {path: size for scan in scans for path, size in zip(scan.images, scan.sizes, strict=True)}
    small, large = (
        _usable(name, root, scan, 0) for root, scan in zip((low_res, high_res), scans, strict=True)
    )
    if os.path.realpath(low_res) == os.path.realpath(high_res):
        small = [path for path in small if is_low_res(path.name)]
        large = [path for path in large if not is_low_res(path.name)]
    relative = [
        [os.fspath(path.relative_to(root)) for path in paths]
        for root, paths in ((low_res, small), (high_res, large))
    ]
    partners = match_files(relative[1], relative[0], where=os.fspath(low_res))
    for which, paths, lonely in (
        ("high-res", relative[1], [index for index, partner in enumerate(partners) if partner is None]),
        ("low-res", relative[0], sorted(set(range(len(small))) - set(partners))),
    ):
        if lonely:
            raise UserError(
                f"{len(lonely)} of {len(paths)} {which} images of {printable(name)} have no partner of the same name: "
                f"{named([paths[index] for index in lonely])}; add it, or remove them"
            )
    pairs = [
        (small[partner], path) for partner, path in zip(partners, large, strict=True) if partner is not None
    ]
    found = scale or max(1, sizes[pairs[0][1]][0] // sizes[pairs[0][0]][0])
    wrong = [pair for pair in pairs if tuple(found * side for side in sizes[pair[0]]) != sizes[pair[1]]]
    if wrong:
        (height, width), (tall, wide) = (sizes[path] for path in wrong[0])
        names = named([os.fspath(path.relative_to(high_res)) for _, path in wrong])
        raise UserError(
            f"{len(wrong)} of {len(pairs)} pairs of {printable(name)} do not have scale {found}: {names}; the first "
            f"has {wide}x{tall} pixels and a low-res image of {width}x{height}, use exactly {found} times its size"
        )
    usable = [pair for pair in pairs if min(sizes[pair[1]]) >= min_side]
    if len(usable) < len(pairs):
        share = f"{len(pairs) - len(usable)} of {len(pairs)} pairs of {printable(name)}"
        _log.warning("skipped %s: the high-res short side is under %d pixels", share, min_side)
    if not usable:
        raise UserError(
            f"{printable(name)} has no pair with a high-res short side of {min_side} pixels: use a smaller crop"
        )

    def load(index: int) -> dict[str, Any]:
        item = {name: read_rgb(path) for name, path in zip(("low_res", "image"), usable[index], strict=True)}
        if tuple(found * side for side in item["low_res"].shape[:2]) != item["image"].shape[:2]:
            raise ImageError(f"no longer has {found} times the size of its low-res image")
        return item

    return Source(
        name,
        load,
        len(usable),
        describe=lambda index: printable(usable[index][1]),
        file_name=lambda index: printable(usable[index][1].relative_to(high_res)),
        cache_mb=cache_mb,
        scale=found,
    )


# ---- Synthetic


def _open_synthetic(name: str, rest: str, min_side: int, cache_mb: int) -> Source:
    """Bicubically upsampled noise, of which image and label are functions of the index."""
    number = r"([1-9]\d{0,8})"
    match = re.fullmatch(f"{number}x{number}x{number}(?::{number})?", rest)
    if match is None:
        raise UserError(
            f"'{printable(name)}' must be synthetic:COUNTxHEIGHTxWIDTH or synthetic:COUNTxHEIGHTxWIDTH:CLASSES: use "
            "such as synthetic:10000x256x256"
        )
    count, height, width, classes = (None if group is None else int(group) for group in match.groups())
    assert count and height and width
    if height * width > _LARGEST_SYNTHETIC or min(height, width) < min_side:
        raise UserError(
            f"'{printable(name)}' has images of {width}x{height} pixels: use a short side of at least {min_side} and "
            f"at most {_LARGEST_SYNTHETIC} pixels"
        )

    def load(index: int) -> dict[str, Any]:
        coarse = np.random.Philox(key=np.array([0, index], np.uint64)).random_raw(
            -(-height // 8) * -(-width // 8) * 3
        )
        small = (coarse & 255).astype(np.uint8).reshape(-(-height // 8), -(-width // 8), 3)
        image = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        return {"image": image} | ({} if classes is None else {"label": index % classes})

    return Source(name, load, count, min_side=min_side, cache_mb=cache_mb, num_classes=classes)


def cut(item: Mapping[str, Any], top: int, left: int, side: int) -> dict[str, Any]:
    """An item of a source with only a square of its image, and the same part of its low-res image if it has one.

    Args:
        top, left, side: in pixels of the image; multiples of the scale if there is a low-res image.
    """
    result = {**item, "image": item["image"][top : top + side, left : left + side]}
    if "low_res" in item:
        scale = item["image"].shape[0] // item["low_res"].shape[0]
        top, left, side = top // scale, left // scale, side // scale
        result["low_res"] = item["low_res"][top : top + side, left : left + side]
    return result


def center(item: Mapping[str, Any], side: int) -> dict[str, Any]:
    """`cut` at the center; with a low-res image, up to half a low-res pixel off the center."""
    scale = item["image"].shape[0] // item["low_res"].shape[0] if "low_res" in item else 1
    top, left = ((length - side) // 2 // scale * scale for length in item["image"].shape[:2])
    return cut(item, top, left, side)
