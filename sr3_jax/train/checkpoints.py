"""Checkpoints of a training run; no other module uses Orbax.

A workdir has `config.json` and `checkpoints/STEP/`. A checkpoint has two items: 'ema', the weights for sampling, and
'train', the rest of the training state, which sampling does not read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sr3_jax.config.load import complete_stored
from sr3_jax.distributed.sharding import process_max
from sr3_jax.errors import UserError
from sr3_jax.files import read_json, write_text
from sr3_jax.image_io.errors import printable
from sr3_jax.storage import is_disk_full, is_url
from sr3_jax.train.state import TrainState
from sr3_jax.types import Params

_log = logging.getLogger("sr3_jax")
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
_INCOMPLETE = "*.orbax-checkpoint-tmp*"  # on file systems, where Orbax renames a folder when it is complete
_COMPLETE = "commit_success.txt"  # in a bucket, where Orbax writes this file last
_PATIENCE = 10.0  # seconds for the writes of a failed save to end

# Orbax raises its errors, so that it need not print each of them with a traceback in five threads as well.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class SaveError(UserError):
    """A checkpoint cannot be saved. The exit code is 2 if the disk is full, otherwise 1: storage may come back."""


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` atomically. UserError if it cannot be written."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_config(workdir: Path) -> dict[str, Any]:
    """The run's config, completed with defaults and migrated from older field names.

    Raises:
        UserError: the file is missing, damaged or not a config.
    """
    path = workdir / CONFIG_FILE
    try:
        stored = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{workdir} has no {CONFIG_FILE}, so it is not a workdir: use one that sr3 train has written"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it from a backup, or use a new workdir"
        ) from None
    return complete_stored(stored, str(workdir))


class Checkpoints:
    """Saves and restores the checkpoints of a workdir. A context manager, which waits for a pending save at its end.

    Any method may raise the SaveError of a pending save. What a failed save has written is removed.

    Args:
        keep: the number of newest checkpoints to keep.
        keep_period: also keep those whose step is a multiple of this; 0 for none.

    Raises:
        UserError: the workdir cannot be written.
    """

    def __init__(self, workdir: Path, *, keep: int = 3, keep_period: int = 0) -> None:
        self._workdir = workdir
        self._pending: Any = None  # the response of a save in the background
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_period)] if keep_period else [])]
        try:
            self._checkpointer = ocp.training.Checkpointer(
                _folder(workdir),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"workdir {workdir} cannot be written ({error.strerror}): use another one"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            with self._explained():
                self._checkpointer.close()
        except Exception:
            if error is None:  # otherwise the first error tells more
                raise
        finally:
            self._remove_incomplete()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save a checkpoint, unless there is one of this step.

        Args:
            wait: return when it is on disk; otherwise when the arrays have been copied from the device.

        Raises:
            SaveError: the storage is full or has failed, at this save or at the one before.
        """
        step = int(state.step)
        if self.latest_step == step:
            if wait:
                self.check(wait=True)
            return
        train = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        items = {"ema": state.ema_params, "train": train}
        with self._explained():
            self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True)
        self.check(wait=wait)

    def check(self, *, wait: bool = False) -> None:
        """Raise the SaveError of a save in the background, if it has failed by now.

        Args:
            wait: for the end of the save.
        """
        if self._pending is None:
            return
        with self._explained(), suppress(TimeoutError):
            self._pending.result(timeout=None if wait else 0)
            self._pending = None

    def restore(self, abstract: TrainState, *, allow_older: bool = False) -> TrainState:
        """Restore the newest checkpoint.

        Args:
            abstract: shapes, dtypes and shardings (`abstract_state`), which may be on another mesh than at the save.
            allow_older: if the newest is damaged, rename it to STEP.damaged, log a warning and restore the one before.

        Raises:
            UserError: the checkpoint is damaged or of another network. It is never silently ignored.
        """
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        while True:
            step = self.latest_step
            error: Exception | None = None
            try:
                state = self._load(step, abstract)
            except Exception as caught:  # Orbax and TensorStore raise many types for a damaged checkpoint
                error = caught
            # A damaged part may be read by one process only.
            if not int(process_max(int(error is not None), mesh)):
                return state
            folder = self._checkpointer.directory / str(step)
            reason = "another process failed" if error is None else first_line(error)
            message = f"checkpoint {folder} cannot be restored ({reason})"
            older = [other.step for other in self._checkpointer.checkpoints if other.step != step]
            if not (allow_older and older):
                fix = (
                    f"set --config.checkpoint.allow_older=true to resume from step {max(older)}, or use a new workdir"
                    if older
                    else "it is the only one, so use a new workdir"
                )
                raise UserError(f"{message}: {fix}") from error
            _log.warning("%s: resuming from step %d; renamed to %s.damaged", message, max(older), step)
            if jax.process_index() == 0:
                folder.rename(_unused(folder.with_name(f"{step}.damaged")))
            int(process_max(0, mesh))  # a barrier: all wait for the rename
            self._checkpointer.reload()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of storage into a SaveError, whatever types and lengths Orbax and TensorStore give them."""
        try:
            yield
        except Exception as error:
            self._pending = None
            full = is_disk_full(error)
            if not full and not isinstance(error, OSError):
                raise
            step = newest_step(self._workdir)
            why = "no space left" if full else first_line(error)
            state = (
                "no checkpoint was saved before it" if step is None else f"the last good one is step {step}"
            )
            fix = "make room" if full else "check the storage"
            message = (
                f"a checkpoint cannot be saved in {printable(self._workdir)} ({why}; {state}): {fix} and run the same "
                "command again to resume"
            )
            failure = SaveError(message)
            failure.exit_code = 2 if full else 1
            raise failure from error

    def _remove_incomplete(self) -> None:
        """Remove what failed saves have left, which may be what fills the disk."""
        left = list(self._checkpointer.directory.glob(_INCOMPLETE))
        if not left:
            return
        deadline = time.monotonic() + _PATIENCE
        for thread in threading.enumerate():  # the other writes of a failed save still run
            if type(thread).__module__.startswith("orbax."):
                # Orbax overrides `join` to raise the error of the thread.
                threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))
        if jax.process_index() == 0:
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)

    def _load(self, step: int | None, abstract: TrainState) -> TrainState:
        train = {"step": abstract.step, "params": abstract.params, "opt_state": abstract.opt_state}
        items = _read(self._checkpointer.directory / str(step), {"ema": abstract.ema_params, "train": train})
        return TrainState(
            items["train"]["step"], items["train"]["params"], items["ema"], items["train"]["opt_state"]
        )


def _read(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """Read the items of a checkpoint, with each process independent, as one that fails would block the others."""
    index = jax.process_index()
    independent = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    with ocp.Context(multiprocessing_options=independent):
        return ocp.load_checkpointables(folder, abstract)


def newest_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint by the folder's name, without reading it; None if there is none."""
    folder = _folder(workdir)
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    if is_url(workdir):
        found = [path for path in found if (path / _COMPLETE).exists()]
    return max((int(path.name) for path in found), default=None)


def _folder(workdir: Path) -> Path:
    folder = workdir / CHECKPOINTS
    return folder if is_url(workdir) else folder.absolute()


def load_ema(workdir: Path) -> tuple[Params, int]:
    """The EMA weights of the newest checkpoint, float32 on the first local device, and its step.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    folder, step = _folder(workdir), newest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint yet: train it first, or wait for the first one")
    try:
        metadata = ocp.checkpointables_metadata(folder / str(step)).metadata["ema"]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata
        )
        return _read(folder / str(step), {"ema": abstract})["ema"], step
    except Exception as error:  # as in `restore`
        raise UserError(f"checkpoint {folder / str(step)} cannot be read ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The reason of an exception in one line; Orbax puts it last, after 'Error details:'."""
    text = str(error).rpartition("Error details:")[2].strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _unused(path: Path) -> Path:
    """The path, with a number appended if it exists."""
    names = (path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())
