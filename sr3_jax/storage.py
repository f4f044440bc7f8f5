"""The one way to write a file: atomically, without leftovers, and with a full disk told apart from other errors.

On this machine's file systems a file is written under a hidden scratch name in its folder and renamed at the end.
While it is written, its scratch file is locked, so that a scratch file without a lock is what a killed process has
left, and can be removed.

Paths may also be URLs of object stores, such as gs://BUCKET/runs (`as_path`). There an object is written on this
machine first and then uploaded as a whole, which is atomic. Object stores have no locks, no folders, and no appending.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from sr3_jax.errors import UserError, printable

SCHEMES = {"gs": ("gcsfs", "gcs")}  # of URLs: the package that each needs, and its extra
_OFF = (
    "EPATH_USE_TF",  # TensorFlow, if installed, has errors of its own
    # gcsfs asks for the type of a bucket over another API, and waits a minute where that is blocked. True is for zonal
    # buckets, which are not tested.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT",
)
SYNC_SECONDS = 60.0  # until what was appended is in an object store
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


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path of this machine, or the path of a URL of an object store, such as gs://BUCKET/runs.

    The latter is an `etils.epath.Path`, which has the methods of `pathlib.Path` that this package uses; it must not be
    passed to `Path` or `os.path`, which take it for a relative path.

    Raises:
        UserError: the scheme of the URL is unknown, or its package is not installed.
    """
    text = os.fspath(path)
    if not is_url(text):
        return Path(text)
    scheme = text.partition("://")[0]
    if scheme not in SCHEMES or not text.partition("://")[2].strip("/"):
        known = " or ".join(f"{name}://BUCKET/PATH" for name in SCHEMES)
        raise UserError(f"'{printable(text)}' is a URL that is not supported: use {known}, or a local path")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"'{printable(text)}' needs {package}, which is not installed: run pip install 'sr3_jax[{extra}]'"
        )
    for name in _OFF:
        os.environ.setdefault(name, "false")
    import fsspec  # slow imports, which local paths do not need
    from etils import epath

    # A cached listing would hide the files of other processes.
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return cast(Path, epath.Path(text))


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL, such as gs://BUCKET/runs."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)) is not None


def absolute(path: Path) -> str:
    """The absolute path as text, with links resolved; of a URL, itself."""
    return os.fspath(path) if is_url(path) else os.path.realpath(path)


def is_file(path: Path) -> bool:
    """Whether a path is a file; False also for impossible names, for which `Path.is_file` raises."""
    return path.is_file() if is_url(path) else os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False also for impossible names, for which `Path.is_dir` raises."""
    return path.is_dir() if is_url(path) else os.path.isdir(path)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """The file itself, or a temporary copy of an object.

    Raises:
        OSError: it cannot be downloaded.
    """
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        file_system, name = _file_system(path)
        with _as_os_error():
            file_system.get_file(name, str(copy))
        yield copy


def upload(source: Path, target: Path) -> None:
    """Write an object from a file, as a whole.

    Raises:
        OSError: it cannot be written.
    """
    file_system, name = _file_system(target)
    with _as_os_error():
        file_system.put_file(str(source), name)


def check_bucket(path: Path) -> None:
    """Write, read and delete an object below a URL.

    Raises:
        UserError: that is not possible. The exit code is 1 if trying again may help.
    """
    probe = path / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}.tmp"
    try:
        probe.write_bytes(b"content")
        readable = probe.read_bytes() == b"content"
        probe.unlink()
    except Exception as error:  # the packages of object stores raise many types
        text = printable(" ".join(str(error).split())[:200] or type(error).__name__)
        failure = UserError(
            f"{printable(path)} cannot be written ({text}): check that the bucket exists, and that your "
            "credentials may read, write and delete its objects"
        )
        refused = isinstance(error, FileNotFoundError | PermissionError) or re.search(
            r"\b40[0134]\b|forbidden|credentials|denied|not exist|not found", text, re.IGNORECASE
        )
        failure.exit_code = 2 if refused else 1
        raise failure from error
    if not readable:
        raise UserError(f"{printable(path)} does not return what was written: use another bucket")


def upload_folder(source: Path, target: Path) -> None:
    """`upload` each file of a folder."""
    for path in source.rglob("*"):
        if path.is_file():
            upload(path, target / path.relative_to(source).as_posix())


def file_size(path: Path) -> int:
    """The bytes of a file or object."""
    found: Any = path.stat()
    return found.length if is_url(path) else found.st_size


def read_object(path: Path) -> bytes:
    """The content of an object.

    Raises:
        OSError: it cannot be read.
    """
    with _as_os_error():
        return path.read_bytes()


def objects(root: Path) -> list[Path]:
    """All objects below a URL.

    Raises:
        OSError: they cannot be listed.
    """
    file_system, name = _file_system(root)
    with _as_os_error():
        return [as_path(file_system.unstrip_protocol(found)) for found in file_system.find(name)]


def _file_system(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn the errors of object stores' packages, which have many types, into OSError with an error number."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        raise OSError(errno.EIO, " ".join(str(error).split())[:200] or type(error).__name__) from error


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield an empty file, open for writing, which replaces `path` on success and vanishes on failure.

    The folder must exist. The first write of this process into a folder removes what killed processes left there. For a
    URL the file is uploaded at the end.

    Args:
        durable: sync to disk before the rename. Without it small files are written ten times as fast, but a power cut
            may leave a damaged one: for callers that check what they read.

    Raises:
        OSError: the file cannot be written.
    """
    if is_url(path):
        with tempfile.NamedTemporaryFile() as copy:
            yield copy.file
            copy.flush()
            upload(Path(copy.name), path)
        return
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


class AppendedFile:
    """A file that a long run appends to; it is created if it does not exist.

    On this machine's file systems what is written is in the file at once. Object stores get it at the latest with the
    first write after a minute, also those that are mounted as a folder, which upload a file when it is closed.

    Raises:
        OSError: here and in all methods, if the file cannot be written. A later call tries again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._copy: Path | None = None  # of an object, on this machine
        if is_url(path):
            self._folder = tempfile.TemporaryDirectory()
            self._copy = Path(self._folder.name, path.name)
            if path.exists():
                with local_copy(path) as found:
                    shutil.copyfile(found, self._copy)
        self._file: IO[bytes] | None = None
        self._open()
        self._synced, self._is_complete = time.monotonic(), True

    def write(self, data: bytes) -> int:
        """Append the data."""
        self._is_complete = False
        if self._open().write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()
        return len(data)

    def flush(self) -> None:
        """Have a local file on the disk."""
        if self._copy is None:
            os.fsync(self._open().fileno())

    def sync(self) -> None:
        """Have everything in the object store now."""
        self._synced = time.monotonic()
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
        if self._copy is not None and not self._is_complete:
            upload(self._copy, self._path)
        self._is_complete = True

    def close(self) -> None:
        """`sync`, for the last time."""
        self.sync()

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = open(self._copy or self._path, "ab", buffering=0)  # noqa: SIM115
        return self._file


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
