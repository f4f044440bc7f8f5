"""Checkpoints of a training run: the only module that uses Orbax.

A workdir holds `config.json` and `checkpoints/STEP/`. A step directory holds two items: 'ema', the weights that
sampling uses, and 'train', the rest of the state; a model is used without reading the second.
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
            f"{workdir} has no {CONFIG_FILE}, so it is not a run's workdir; give one that sr3 train made"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from a copy, or train in a new workdir"
        ) from None


class Checkpoints:
    """The checkpoints of a workdir: a context manager, so that a save in flight is finished at the end.

    Args:
        workdir: the run's folder.
        keep: how many of the latest are kept.
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
                f"workdir {workdir} cannot be written ({error.strerror}): choose another"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """The newest whole checkpoint; half-written ones are never among them."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save under the state's own step; returns when the arrays have left the device unless `wait`."""
        step = int(state.step)
        if self.latest_step == step:
            return
        train = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        items = {"ema": state.ema_params, "train": train}
        response = self._checkpointer.save_checkpointables_async(step, items, force=True)
        if wait and response is not None:
            response.result()

    def restore(self, abstract: TrainState, *, allow_older: bool = False) -> TrainState:
        """The newest state, onto the shardings of `abstract`, whatever mesh it was saved from.

        Args:
            allow_older: go on from the newest that can be read; damaged ones are renamed to STEP.damaged and told.

        Raises:
            UserError: it is damaged or of another network. Training never starts afresh over it.
        """
        mesh = abstract.step.sharding.mesh
        while True:
            step = self.latest_step
            error: Exception | None = None
            try:
                state = self._load(step, abstract)
            except Exception as caught:  # Orbax and TensorStore raise many prediction: it can't be read
                error = caught
            # One process may meet a damaged part that no other one reads.
            if not int(process_max(int(error is not None), mesh)):
                return state
            folder = self._checkpointer.directory / str(step)
            reason = "another process failed" if error is None else first_line(error)
            what = f"checkpoint {folder} cannot be restored ({reason})"
            older = [other.step for other in self._checkpointer.checkpoints if other.step != step]
            if not (allow_older and older):
                way = (
                    f"give --config.checkpoint.allow_older=true to go on from step {max(older)}, or a new workdir"
                    if older
                    else "there is no older one: give a new workdir to start anew"
                )
                raise UserError(f"{what}; {way}") from error
            _log.warning("%s; going on from step %d, and keeping it as %s.damaged", what, max(older), step)
            if jax.process_index() == 0:
                os.rename(folder, _unused(Path(f"{folder}.damaged")))
            int(process_max(0, mesh))  # all wait for the renaming
            self._checkpointer.reload()

    def _load(self, step: int | None, abstract: TrainState) -> TrainState:
        train = {"step": abstract.step, "params": abstract.params, "opt_state": abstract.opt_state}
        items = _read(self._checkpointer.directory / str(step), {"ema": abstract.ema_params, "train": train})
        return TrainState(
            items["train"]["step"], items["train"]["params"], items["ema"], items["train"]["opt_state"]
        )


def _read(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The items of a step, each process on its own: one that fails must not leave the others at Orbax's barrier."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    with ocp.Context(multiprocessing_options=alone):
        return ocp.load_checkpointables(folder, abstract)


def newest_step(workdir: Path) -> int | None:
    """The step of the newest checkpoint, None if there is none; nothing of it is read."""
    folder = workdir / CHECKPOINTS
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def load_ema(workdir: Path) -> tuple[Params, int]:
    """The moving-average weights of the newest checkpoint, as float32 on the default device, and its step.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    folder, step = (workdir / CHECKPOINTS).absolute(), newest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint yet; train it first, or wait for its first one")
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
    """What is wrong, in one line; Orbax puts its reason last, after 'Error details:'."""
    text = str(error).rpartition("Error details:")[2].strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _unused(path: Path) -> Path:
    """The path, or with the first number that makes it new."""
    names = (path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())
