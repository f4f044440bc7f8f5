"""The workdir of a run: checked and locked at the start, so that its faults are found before hours of training."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from sr3_jax.distributed.sharding import process_max
from sr3_jax.errors import UserError
from sr3_jax.files import folder_lock
from sr3_jax.image_io.errors import printable, reason
from sr3_jax.storage import SCRATCH_PREFIX, check_bucket, is_url, remove_leftovers

_PATIENCE = 10.0  # seconds until other machines must see a new file


@contextmanager
def locked_workdir(workdir: Path, mesh: Mesh) -> Iterator[None]:
    """Create a workdir, lock it for this job, and check that it can hold checkpoints. All processes must call it.

    Process 0 has the lock. It also renames a folder of two files, as a checkpoint needs it, and writes a file that all
    other processes must see. In a bucket (gs://) there is no lock, and checkpoints need no renaming.

    Raises:
        UserError: on all processes: another run uses the workdir, it cannot be written, its file system cannot rename
            folders, or the processes do not share it.
    """
    with ExitStack() as stack:
        name, error = 0, None
        if jax.process_index() == 0:
            try:
                if is_url(workdir):
                    check_bucket(workdir)
                else:
                    _make(workdir)
                    stack.enter_context(folder_lock(workdir, "workdir"))
                    remove_leftovers(workdir)
                    _check_folder_rename(workdir)
                name = 1 + secrets.randbelow(2**31 - 2)
                if jax.process_count() > 1:
                    stack.callback(_token(workdir, name).unlink, missing_ok=True)
                    _token(workdir, name).write_bytes(b"")
            except UserError as failure:
                error, name = failure, 0
            except OSError as failure:
                error, name = _unwritable(workdir, failure), 0
        name = int(process_max(name, mesh))
        if not name:
            raise error or UserError(f"process 0 cannot use workdir {printable(workdir)}: see its error")
        blind = 0 if _appears(_token(workdir, name)) or jax.process_count() == 1 else jax.process_index()
        blind = int(process_max(blind, mesh))
        if blind:
            raise UserError(
                f"workdir {printable(workdir)} of process {blind} is not that of process 0: use a folder that all "
                "machines share, such as a network file system"
            )
        _token(workdir, name).unlink(missing_ok=True)
        yield


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"workdir {printable(workdir)} is a file: use a folder") from error


def _unwritable(workdir: Path, error: OSError) -> UserError:
    return UserError(
        f"workdir {printable(workdir)} cannot be written ({reason(error)}): make it writable, or use another one"
    )


def _check_folder_rename(workdir: Path) -> None:
    """Rename a folder of two files, which object stores that are mounted as a folder cannot do."""
    old, new = (workdir / f"{SCRATCH_PREFIX}probe-{name}.tmp" for name in ("old", "new"))
    try:
        for folder in (old, new):  # of a killed process; this one has the lock
            shutil.rmtree(folder, ignore_errors=True)
        old.mkdir()
        for file in ("a", "b"):
            (old / file).write_bytes(b"content")
        try:
            os.rename(old, new)
            complete = sorted(os.listdir(new)) == ["a", "b"]
        except OSError as error:
            raise UserError(
                f"workdir {printable(workdir)} is on a file system that cannot rename folders ({reason(error)}), "
                "which checkpoints need: use another one; a Cloud Storage bucket needs a hierarchical namespace, or "
                "to be mounted with --rename-dir-limit=1000000, or use gs://BUCKET/PATH without a mount"
            ) from error
        if not complete:
            raise UserError(
                f"workdir {printable(workdir)} is on a file system that loses files when a folder is renamed: use "
                "another one"
            )
    finally:
        for folder in (old, new):
            shutil.rmtree(folder, ignore_errors=True)


def _token(workdir: Path, name: int) -> Path:
    return workdir / f"{SCRATCH_PREFIX}token-{name}.tmp"


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        if jax.process_index() == 0 or jax.process_count() == 1 or time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
