"""Make a TFDS data set from a folder of images; every image is decoded in full, and unusable files are reported."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sr3_jax.data import store
from sr3_jax.data.sources import retried, scan_folder
from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.image_io.image_file import ImageError, UnreadableError, is_plain, read_rgb

_VERSION = "1.0.0"
_PER_SHARD = 10_000  # images per ArrayRecord file: about a gigabyte of photographs
_PER_WRITE = 64  # images
_LARGEST_FILE = 2**30  # bytes; files are read into memory
_SPLIT_OF = {  # folder names of the usual layouts, in lower case
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


class NothingPrepared(UserError):
    """No data set was written; `rejected` has (file, reason) for each unusable file."""

    def __init__(self, message: str, rejected: list[tuple[Path, str]]) -> None:
        super().__init__(message)
        self.rejected = rejected


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`: examples per split, class names (or none), and (file, reason) for skipped files."""

    folder: Path
    examples: dict[str, int]
    labels: list[str]
    rejected: list[tuple[Path, str]]


def prepare(
    root: Path,
    *,
    name: str,
    data_dir: Path,
    test_count: int = 0,
    test_fraction: float = 0.0,
    overwrite: bool = False,
    threads: int = 4,
    progress: Callable[[int], None] = lambda total: None,
) -> Prepared:
    """Write the images under `root` as the data set DATA_DIR/NAME with the splits 'train' and, if asked for, 'test'.

    Folders train, val and test (at least two of them, and no others) become the splits 'train', 'validation', 'test'.
    Each example has 'image', 'file_name' (relative to `root`), and 'label' if every image is exactly one folder deep
    (in the folder of its split, if there are such) in at least two folders. Plain RGB JPEG and PNG files are stored
    unchanged, others as PNG with the same pixels. The images of 'test' are chosen by a hash of their names. The same
    images give the same bytes. The data set is written atomically: an interrupted run leaves nothing under its name.

    Args:
      test_count, test_fraction: size of the split 'test'; at most one of them.
      progress: called with the number of images after each one.

    Raises:
      UserError: the name is taken or invalid, or folders of splits are mixed with others.
      DataUnavailable: a file cannot be read because of its storage.
      NothingPrepared: no image can be read, or none would be left for 'train'.
    """
    _require_free(name, data_dir, overwrite)
    scan = scan_folder(root)
    images, rejected = scan.images, list(scan.rejected)
    if not images:
        raise NothingPrepared(f"'{printable(root)}' has no readable image: use a folder of images", rejected)
    by_folder = _splits_of_folders(root, images)
    if by_folder and (test_count or test_fraction):
        raise UserError(
            f"'{printable(root)}' already has the splits {', '.join(by_folder)} as folders: omit the size of the test "
            "split"
        )
    if test_fraction:
        test_count = max(1, round(test_fraction * len(images)))
    if test_count >= len(images):
        message = (
            f"a test split of {test_count} leaves none of the {len(images)} images for training: use fewer"
        )
        raise NothingPrepared(message, rejected)
    depth = 1 if by_folder else 0
    labels = _labels(root, images, depth)
    splits = {"test": test_count} if test_count else {}
    left = images
    with store.atomic_data_set(data_dir, name, _VERSION, overwrite=overwrite) as work:
        sizes = {split: len(paths) for split, paths in by_folder.items()} or splits | {"train": len(images)}
        writer = _Writer(work, name, labels, sorted(sizes, key=lambda split: split != "train"), depth)
        for split, most in sizes.items():
            done: set[Path] = set()
            candidates = left if split == "train" else sorted(left, key=lambda path: _hash(path, root))
            candidates = by_folder.get(split, candidates)
            with ThreadPoolExecutor(threads) as pool:
                for path, data in _in_order(_checked, candidates, pool, ahead=4 * threads):
                    if writer.examples[split] == most:
                        break
                    done.add(path)
                    progress(len(images))
                    if isinstance(data, ImageError):
                        rejected.append((path, str(data)))
                    else:
                        writer.add(split, path.relative_to(root), data)
            left = [path for path in left if path not in done]
        if not all(writer.examples.values()):
            message = f"'{printable(root)}' has too few readable images for the splits: add images"
            raise NothingPrepared(message, rejected)
        writer.close()
    rejected.sort(key=lambda one: os.fsencode(one[0]))
    return Prepared(data_dir / name / _VERSION, writer.examples, labels, rejected)


def _require_free(name: str, data_dir: Path, overwrite: bool) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"name '{printable(name)}' is not a TFDS name: use lowercase letters, digits and underscores"
        )
    taken = store.find(name, where=[str(data_dir)])
    if taken is not None and taken.name != _VERSION:
        raise UserError(f"the data set '{name}' in {data_dir} was not made by sr3 prepare: use another name")
    if taken is not None and not overwrite:
        raise UserError(
            f"the data set '{name}' already exists in {data_dir}: use another name or add --overwrite"
        )


def _hash(path: Path, root: Path) -> bytes:
    return hashlib.sha256(os.fsencode(path.relative_to(root))).digest()


def _splits_of_folders(root: Path, images: list[Path]) -> dict[str, list[Path]]:
    """The images of each split if the folders of `root` are train, val and test, at least two of them; else {}."""
    splits: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in images:
        folder, *names = path.relative_to(root).parts
        split = _SPLIT_OF.get(folder.lower()) if names else None
        if split is None:
            others.append(path)
        else:
            splits.setdefault(split, []).append(path)
    if len(splits) < 2:  # 'train' by itself may be a class, next to 'car' and 'plane'
        return {}
    if others:
        raise UserError(
            f"'{printable(root)}' has folders of splits ({', '.join(splits)}) and other images such as "
            f"'{printable(others[0].relative_to(root))}': move those into the folder of a split, or rename the folders"
        )
    return splits


def _labels(root: Path, images: list[Path], depth: int) -> list[str]:
    parts = [path.relative_to(root).parts[depth:] for path in images]
    folders = sorted({part[0] for part in parts}, key=os.fsencode)
    one_deep = all(len(part) == 2 for part in parts)
    return [printable(folder) for folder in folders] if one_deep and len(folders) > 1 else []


def _checked(path: Path) -> bytes | ImageError:
    """The bytes to store: the file itself if it is plain, else a PNG of its pixels. DataUnavailable as in training."""

    def read() -> bytes:
        try:
            if (size := path.stat().st_size) > _LARGEST_FILE:
                raise ImageError(f"has {size / 2**30:.1f} GiB, more than 1 GiB")
            return path.read_bytes()
        except OSError as error:
            raise UnreadableError(reason(error), error.errno or 0) from error

    try:
        data = retried(read, printable(path), permanent=(errno.EACCES, errno.EPERM))
        rgb = read_rgb(data)
        if is_plain(data, rgb):
            return data
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "PNG")
        return file.getvalue()
    except ImageError as error:
        return error


def _in_order(
    work: Callable[[Path], Any], paths: Iterable[Path], pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[tuple[Path, Any]]:
    """Yield (path, work(path)) in the order of `paths`, with at most `ahead` pending results."""
    waiting: deque[tuple[Path, Future[Any]]] = deque()
    try:
        for path in paths:
            waiting.append((path, pool.submit(work, path)))
            if len(waiting) > ahead:
                path, future = waiting.popleft()
                yield path, future.result()
        while waiting:
            path, future = waiting.popleft()
            yield path, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _serializer(specs: Any) -> Any:
    """TFDS's serializer of examples, but equal examples give equal bytes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    class Deterministic(ExampleSerializer):
        def serialize_example(self, example: Any) -> bytes:
            return self.get_tf_example(example).SerializeToString(deterministic=True)

    return Deterministic(specs)


class _Writer:
    """Appends examples to the splits of a new data set."""

    def __init__(self, data_dir: Path, name: str, labels: list[str], splits: list[str], depth: int) -> None:
        import tensorflow_datasets as tfds

        folder = data_dir / name / _VERSION
        folder.mkdir(parents=True)
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "file_name": tfds.features.Text(),
        }
        if labels:
            features["label"] = tfds.features.ClassLabel(names=labels)
        identity = tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version(_VERSION), data_dir=str(folder), module_name=__name__
        )
        info = tfds.core.DatasetInfo(
            builder=identity, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )
        self._writer = tfds.core.SequentialWriter(info, _PER_SHARD, file_format="array_record")
        # protobuf orders the fields of an example at random in each process unless told otherwise, which TFDS does not.
        self._writer._serializer = _serializer(info.features.get_serialized_info())
        self._writer.initialize_splits(splits)
        self._labels, self._depth = labels, depth
        self._waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
        self.examples = dict.fromkeys(splits, 0)

    def add(self, split: str, file_name: Path, data: bytes) -> None:
        example: dict[str, Any] = {"image": data, "file_name": printable(file_name)}
        if self._labels:
            example["label"] = printable(file_name.parts[self._depth])
        self._waiting[split].append(example)
        self.examples[split] += 1
        if len(self._waiting[split]) == _PER_WRITE:
            self._flush()

    def _flush(self) -> None:
        self._writer.add_examples(self._waiting)
        self._waiting = {split: [] for split in self._waiting}

    def close(self) -> None:
        self._flush()
        self._writer.close_all()
