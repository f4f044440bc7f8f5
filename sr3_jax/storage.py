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
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

SCRATCH_PREFIX = ".sr3-"  # of names that no reader may use
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile(r"no space left|quota exceeded|file too large|OS error (28|122|27)\b", re.IGNORECASE)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


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
        file = open(folder / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}.tmp", "xb")  # noqa: SIM115
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
