"""TFDS data sets on disk: where they lie, how one is found, and how one appears there whole or not at all.

TensorFlow Datasets is imported on first use, because it takes half a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sr3_jax.errors import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_VARIABLES = ("SR3_DATA_DIR", "TFDS_DATA_DIR")


def data_dir() -> Path:
    """The folder that we write data sets to: $SR3_DATA_DIR, else $TFDS_DATA_DIR, else under ~/.cache."""
    for chosen in (os.environ.get(variable, "") for variable in _VARIABLES):
        if chosen and "://" not in chosen:  # we do not write to buckets
            return Path(chosen).expanduser()
    return Path.home() / ".cache" / "sr3_jax" / "datasets"


def search_path() -> list[str]:
    """The folders in which a data set is looked for, in order; TFDS's own default comes last."""
    places = [os.environ.get(variable, "") for variable in _VARIABLES]
    places += [str(data_dir()), "~/tensorflow_datasets"]
    return list(dict.fromkeys(os.path.expanduser(place) for place in places if place))


def find(name: str, *, version: str | None = None, where: list[str] | None = None) -> Any | None:
    """The folder of the data set NAME or NAME/CONFIG, its newest version unless `version` is given, or None.

    Returns a `tfds.core.Path`, so that a data dir in a bucket works where its file system is installed.
    """
    import tensorflow_datasets as tfds

    for place in search_path() if where is None else where:
        folder = tfds.core.Path(place) / name
        if not folder.is_dir():
            continue
        versions = [child.name for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
        versions = [one for one in versions if version in (None, one)]
        versions = [one for one in versions if (folder / one / "features.json").exists()]
        if versions:
            return folder / max(versions, key=lambda one: tuple(int(part) for part in one.split(".")))
    return None


def require(name: str, *, version: str | None = None) -> Any:
    """`find`, but with a UserError that says what is there instead when nothing is found."""
    import tensorflow_datasets as tfds

    if (folder := find(name, version=version)) is not None:
        return folder
    if version is not None and (other := find(name)) is not None:
        raise UserError(
            f"the data set '{name}' is there as version {other.name}, not {version}: leave it out"
        )
    for place in search_path():
        folder = tfds.core.Path(place) / name
        children = sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
        configs = [child for child in children if find(f"{name}/{child}", where=[place])]
        if configs:
            raise UserError(
                f"the data set '{name}' has configs: write tfds:{name}/CONFIG:SPLIT, "
                f"with CONFIG one of {quoted(configs)}"
            )
    raise UserError(
        f"the data set '{name}' is not prepared in {' or '.join(search_path())}: make it from a folder of "
        f"images with `sr3 prepare PATH --name {name}`, or set SR3_DATA_DIR to where it is"
    )


def quoted(names: Any) -> str:
    """'a', 'b', 'c'."""
    return ", ".join(f"'{name}'" for name in names)


@contextlib.contextmanager
def appears_whole(root: Path, name: str, version: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary data dir; on success its NAME/VERSION moves to root/NAME/VERSION in one rename.

    When another process was first, its data set is kept and ours dropped, unless `overwrite`. On an error
    everything temporary is removed; what a killed process left is removed by the next one.

    Raises:
      UserError: `root` can't be written to.
    """
    prefix = f".incomplete-{name}-"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root, prefix)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        lock = (work / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # held while we live: tells a leftover from work in progress
        work = work.rename(root / f"{prefix}{work.name.removeprefix('.new-')}")
    except OSError as error:
        raise UserError(
            f"the data dir {root} can't be written to ({error.strerror}): name another with SR3_DATA_DIR"
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
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.close()


def _remove_leftovers(root: Path, prefix: str) -> None:
    for left in root.glob(f"{prefix}*"):
        try:
            with (left / ".lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            pass  # its owner lives, or has just removed it


def build(builder_class: Any, root: Path) -> Path:
    """Run a TFDS builder that downloads nothing; returns the folder of its ArrayRecord files under `root`."""
    import tensorflow_datasets as tfds

    version = str(builder_class.VERSION)
    with (
        appears_whole(root, builder_class.name, version) as work,
        open(os.devnull, "w", encoding="utf-8") as silence,
        contextlib.redirect_stdout(silence),  # TFDS prints where it prepares what
    ):
        tfds.disable_progress_bar()
        builder_class(data_dir=work, file_format="array_record").download_and_prepare()
    return root / builder_class.name / version
