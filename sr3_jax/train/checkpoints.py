"""Checkpoints of a training run; no other module uses Orbax.

A workdir has `config.json` and `checkpoints/STEP/`. A checkpoint has two items: 'ema', the weights for sampling, and
'train', the rest of the training state, which sampling does not read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sr3_jax.config.load import complete_stored
from sr3_jax.distributed.sharding import process_max
from sr3_jax.errors import UserError
from sr3_jax.files import atomic_write
from sr3_jax.train.state import TrainState
from sr3_jax.types import Params

_log = logging.getLogger("sr3_jax")
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json` atomically."""
    workdir.mkdir(parents=True, exist_ok=True)
    with atomic_write(workdir / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(workdir: Path) -> dict[str, Any]:
    """The run's config, completed with defaults and migrated from older field names.

    Raises:
        UserError: the file is missing, damaged or not a config.
    """
    path = workdir / CONFIG_FILE
    try:
        return complete_stored(json.loads(path.read_text(encoding="utf-8")), str(workdir))
    except FileNotFoundError:
        raise UserError(
            f"{workdir} has no {CONFIG_FILE}, so it is not a workdir: use one that sr3 train has written"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it from a backup, or use a new workdir"
        ) from None


class Checkpoints:
    """Saves and restores the checkpoints of a workdir. A context manager, which waits for a pending save at its end.

    Args:
        keep: the number of newest checkpoints to keep.

    Raises:
        UserError: the workdir cannot be written.
    """

    def __init__(self, workdir: Path, *, keep: int = 3) -> None:
        policies = ocp.training.preservation_policies
        try:
            self._checkpointer = ocp.training.Checkpointer(
                (workdir / CHECKPOINTS).absolute(),
                preservation_policy=policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(
                f"workdir {workdir} cannot be written ({error.strerror}): use another one"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save a checkpoint, unless there is one of this step.

        Args:
            wait: return when it is on disk; otherwise when the arrays have been copied from the device.
        """
        step = int(state.step)
        if self.latest_step == step:
            return
        train = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        items = {"ema": state.ema_params, "train": train}
        response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        if wait and response is not None:
            response.result()

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
                os.rename(folder, _unused(Path(f"{folder}.damaged")))
            int(process_max(0, mesh))  # a barrier: all wait for the rename
            self._checkpointer.reload()

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
    folder = workdir / CHECKPOINTS
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def load_ema(workdir: Path) -> tuple[Params, int]:
    """The EMA weights of the newest checkpoint, float32 on the first local device, and its step.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    folder, step = (workdir / CHECKPOINTS).absolute(), newest_step(workdir)
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
