"""TFDS data sets on disk: where they are stored, how they are found, and how they are written atomically.

TensorFlow Datasets is imported on first use, since the import takes half a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sr3_jax.errors import UserError
from sr3_jax.storage import as_path, is_disk_full, temporary_folder, try_lock

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_VARIABLES = ("SR3_DATA_DIR", "TFDS_DATA_DIR")


def data_dir() -> Path:
    """The folder that data sets are written to: $SR3_DATA_DIR, else $TFDS_DATA_DIR, else ~/.cache/sr3_jax/datasets.

    Without a home folder it is in the folder of temporary files.

    Raises:
        UserError: that folder cannot be made, or belongs to another user.
    """
    for chosen in (os.environ.get(variable, "") for variable in _VARIABLES):
        if chosen and "://" not in chosen:  # buckets are only read
            return Path(os.path.expanduser(chosen))
    home = Path(os.path.expanduser("~"))
    if home.is_absolute():
        return home / ".cache" / "sr3_jax" / "datasets"
    if (folder := temporary_folder("datasets")) is None:  # no home folder, as in some containers
        raise UserError("there is no home folder for data sets: set SR3_DATA_DIR to a folder")
    return folder


def search_path() -> list[str]:
    """The folders that are searched for a data set, in order; TFDS's default comes last."""
    places = [os.environ.get(variable, "") for variable in _VARIABLES]
    places += [str(data_dir()), "~/tensorflow_datasets"]
    expanded = [os.path.expanduser(place) for place in places if place]
    return list(dict.fromkeys(place for place in expanded if not place.startswith("~")))  # no home folder


def find(name: str, *, version: str | None = None, where: list[str] | None = None) -> Any | None:
    """The folder of the data set NAME or NAME/CONFIG, its newest version unless `version` is given, or None.

    Returns a `tfds.core.Path`, so that a bucket works as data dir where its file system is installed.
    """
    import tensorflow_datasets as tfds

    for place in search_path() if where is None else where:
        folder = tfds.core.Path(as_path(place)) / name
        if not folder.is_dir():
            continue
        versions = [child.name for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
        versions = [one for one in versions if version in (None, one)]
        versions = [one for one in versions if (folder / one / "features.json").exists()]
        if versions:
            return folder / max(versions, key=lambda one: tuple(int(part) for part in one.split(".")))
    return None


def require(name: str, *, version: str | None = None) -> Any:
    """`find`, but raise a UserError that names alternatives if the data set does not exist."""
    import tensorflow_datasets as tfds

    if (folder := find(name, version=version)) is not None:
        return folder
    if version is not None and (other := find(name)) is not None:
        raise UserError(
            f"the data set '{name}' exists as version {other.name}, not {version}: remove the version from the name"
        )
    for place in search_path():
        folder = tfds.core.Path(as_path(place)) / name
        children = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
        configs = [child for child in children if find(f"{name}/{child}", where=[place])]
        if configs:
            raise UserError(
                f"the data set '{name}' has configs: use tfds:{name}/CONFIG:SPLIT, "
                f"with CONFIG one of {quoted(configs)}"
            )
    raise UserError(
        f"the data set '{name}' does not exist in {' or '.join(search_path())}: make it from a folder of images with "
        f"`sr3 prepare PATH --name {name}`, or set SR3_DATA_DIR to the folder that contains it"
    )


def quoted(names: Any) -> str:
    """'a', 'b', 'c'."""
    return ", ".join(f"'{name}'" for name in names)


@contextlib.contextmanager
def atomic_data_set(root: Path, name: str, version: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary data dir; on success its NAME/VERSION is moved to root/NAME/VERSION in one rename.

    If another process finished first, its data set stays and ours is discarded, unless `overwrite`. Temporary files are
    removed on errors; those of a killed process are removed by the next call.

    Raises:
      UserError: `root` cannot be written to, or is full.
    """
    prefix = f".incomplete-{name}-"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process at a time removes leftovers and makes its folder: outside of this block every folder in use is
        # locked by its process, which distinguishes it from leftovers.
        with (root / ".lock").open("w") as turn:
            try_lock(turn, wait=True)
            _remove_leftovers(root, prefix, Path(name) / version)
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
            lock = (work / ".lock").open("w")
            try_lock(lock)
    except OSError as error:
        raise UserError(
            f"the data dir {root} cannot be written to ({error.strerror}): set SR3_DATA_DIR to another folder"
        ) from error
    try:
        yield work
        final = root / name / version
        final.parent.mkdir(exist_ok=True)
        if overwrite and final.exists():
            final.rename(work / "replaced")
        try:
            (work / name / version).rename(final)
        except OSError:
            if not final.exists():
                raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"the data dir {root} is full: make room and run the same command again, or use another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def _remove_leftovers(root: Path, prefix: str, final: Path) -> None:
    """Remove the folders of processes that were killed. A data set that was about to replace another one is kept."""
    for left in root.glob(f"{prefix}*"):
        with (
            contextlib.suppress(OSError),
            (left / ".lock").open("a") as lock,
        ):  # created if the process had no time to
            if try_lock(lock):
                if (left / "replaced").exists() and not (root / final).exists():
                    (left / final).rename(root / final)
                shutil.rmtree(left, ignore_errors=True)


def build(builder_class: Any, root: Path) -> Path:
    """Run a TFDS builder that downloads nothing; return the folder of its ArrayRecord files under `root`."""
    import tensorflow_datasets as tfds

    version = str(builder_class.VERSION)
    with (
        atomic_data_set(root, builder_class.name, version) as work,
        open(os.devnull, "w", encoding="utf-8") as silence,
        contextlib.redirect_stdout(silence),  # TFDS prints progress
    ):
        tfds.disable_progress_bar()
        builder_class(data_dir=work, file_format="array_record").download_and_prepare()
    return root / builder_class.name / version
