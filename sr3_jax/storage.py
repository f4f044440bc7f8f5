"""The one way to write a file: atomically, without leftovers, and with a full disk told apart from other errors.

A file is written under a hidden scratch name in its folder and renamed at the end. While it is written, its scratch
file is locked, so that a scratch file without a lock is what a killed process has left, and can be removed.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

SCRATCH_PREFIX = ".sr3-"  # of names that no reader may use
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(r"no space left|quota exceeded|file too large|OS error (28|122|27)\b", re.IGNORECASE)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def cache_folder(name: str) -> Path | None:
    """The folder $XDG_CACHE_HOME/sr3_jax/NAME, or ~/.cache/sr3_jax/NAME, private to this user; it is created.

    None if there is no such folder: without a home folder, in one that cannot be written, or if other users could have
    written to it, since a cache may hold native programs.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base, "sr3_jax", name)
    if not folder.is_absolute():  # expanduser leaves '~' as it is if the user has no home folder
        return None
    return folder if _make_private(folder) else None


def temporary_folder(name: str) -> Path | None:
    """As `cache_folder`, but in the folder of temporary files, for data that is needed without a home folder."""
    folder = Path(tempfile.gettempdir(), f"sr3_jax-{os.getuid()}", name).absolute()
    return folder if _make_private(folder) else None


def _make_private(folder: Path) -> bool:
    """Create a folder that only this user can write to, and its parent. Whether it and its parent are that."""
    try:
        for one in (folder.parent, folder):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = one.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                return False
        folder.chmod(0o700)
    except OSError:
        return False
    return True


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield an empty file, open for writing, which replaces `path` on success and vanishes on failure.

    The folder must exist. The first write of this process into a folder removes what killed processes left there.

    Args:
        durable: sync to disk before the rename. Without it small files are written ten times as fast, but a power cut
            may leave a damaged one: for callers that check what they read.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    _sweep_once(path.parent)
    file = _open_scratch(path.parent)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(file.name, path)
    finally:
        with suppress(OSError):  # it does not exist any more after the rename
            os.unlink(file.name)


def try_lock(file: IO, *, wait: bool = False) -> bool | None:
    """Lock a file until it is closed or this process ends.

    Returns:
        True; False if another process has it; None on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove the scratch files in a folder whose processes have ended; without locks none are removed."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not (entry.name.startswith(SCRATCH_PREFIX) and entry.name.endswith(".tmp")):
                continue
            with suppress(OSError), open(entry.path, "r+b") as file:
                if try_lock(file):
                    os.unlink(entry.path)


_sweep_once = functools.cache(remove_leftovers)


def _open_scratch(folder: Path) -> IO[bytes]:
    """A new locked file. The name does not derive from the target's, which may already have the maximum length."""
    while True:
        file = open(folder / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}.tmp", "x+b")  # noqa: SIM115
        try_lock(file, wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, a quota or a limit of the file size is behind an exception, through its causes.

    C++ libraries raise errors of their own types, which have the reason in their text only.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
