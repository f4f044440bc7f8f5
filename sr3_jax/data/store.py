"""TFDS data sets on disk: where they lie, how one is found, and how one appears there whole or not at all.

TensorFlow Datasets is imported on first use, because it takes half a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sr3_jax.aliases import UserError

_VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_dir() -> Path:
    """The folder that we write data sets to: $SR3_DATA_DIR, else $TFDS_DATA_DIR, else under ~/.cache."""
    chosen = os.environ.get("SR3_DATA_DIR") or os.environ.get("TFDS_DATA_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "sr3_jax" / "datasets"


def search_path() -> list[str]:
    """The folders in which a data set is looked for, in order; TFDS's own default comes last."""
    places = [str(data_dir()), os.environ.get("TFDS_DATA_DIR", ""), "~/tensorflow_datasets"]
    return list(dict.fromkeys(os.path.expanduser(place) for place in places if place))


def find(name: str, *, version: str | None = None, where: list[str] | None = None) -> Any | None:
    """The folder of the data set NAME or NAME/CONFIG, its newest version unless `version` is given, or None.

    Returns a `tfds.core.Path`, so that a data dir in a bucket works where its file system is installed.
    """
    import tensorflow_datasets as tfds

    for place in search_path() if where is None else where:
        folder = tfds.core.Path(place) / name
        if not folder.exists():
            continue
        versions = [child.name for child in folder.iterdir() if _VERSION.fullmatch(child.name)]
        versions = [one for one in versions if version in (None, one)]
        versions = [one for one in versions if (folder / one / "features.json").exists()]
        if versions:
            return folder / max(versions, key=lambda one: tuple(int(part) for part in one.split(".")))
    return None


@contextlib.contextmanager
def appears_whole(root: Path, name: str, version: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary data dir; on success its NAME/VERSION moves to root/NAME/VERSION in one rename.

    When another process was first, its data set is kept and ours dropped, unless `overwrite`. On an error
    everything temporary is removed; what a killed process left is removed by the next one on that machine.

    Raises:
      UserError: `root` can't be written to.
    """
    prefix = f".incomplete-{name}-{socket.gethostname()}-"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root, prefix)
        work = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=root))
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


def _remove_leftovers(root: Path, prefix: str) -> None:
    for left in root.glob(f"{prefix}*"):
        process = left.name.removeprefix(prefix).split("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OSError):
            pass  # not ours to judge


def build(builder_class: Any, root: Path) -> None:
    """Run a TFDS builder that downloads nothing, into root, as ArrayRecord files and without TFDS's chatter."""
    import tensorflow_datasets as tfds

    version = str(builder_class.VERSION)
    with (
        appears_whole(root, builder_class.name, version) as work,
        open(os.devnull, "w", encoding="utf-8") as silence,
        contextlib.redirect_stdout(silence),
    ):
        tfds.disable_progress_bar()
        builder = builder_class(data_dir=work, file_format="array_record")
        builder.download_and_prepare()
