"""The training run: restore, then for each step: train, log, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sr3_jax.config.experiment import Experiment, check_batch
from sr3_jax.config.schema import DEFAULTS
from sr3_jax.data.batches import batches, center_crops
from sr3_jax.data.sources import Source, open_source, squares
from sr3_jax.distributed import sharding
from sr3_jax.distributed.signals import stop_signals
from sr3_jax.errors import UserError
from sr3_jax.inference.model import load
from sr3_jax.train import checkpoints
from sr3_jax.train.best import Best
from sr3_jax.train.held_out import HeldOutEvaluation
from sr3_jax.train.metric_writer import MetricWriter, read_metrics
from sr3_jax.train.state import TrainState, abstract_state, create_state, start_from
from sr3_jax.train.step import jit_train_step, make_train_step
from sr3_jax.train.window import MetricWindow

_log = logging.getLogger("sr3_jax")
_TIME_IS_OVER = 1  # below the exit codes of signals
FIXED_ON_RESUME = {  # (): all fields
    "model": (),
    "diffusion": (),
    "optim": (),
    "data": ("scale", "shrink", "label_dropout", "augment", "augment_largest"),
    "stage": ("size",),
}


def train(experiment: Experiment, workdir: Path) -> int:
    """Run an experiment in a workdir, from its newest checkpoint if it has one.

    Returns:
        0 when the run is complete, 143 or 130 when SIGTERM or Ctrl-C stopped it after a save.

    Raises:
        UserError: the config does not fit the machine, the data or the workdir; the loss is not finite.
    """
    config = experiment.config
    run, data = config["train"], config["data"]
    mesh = sharding.make_mesh(**config["mesh"])
    check_batch(config, devices=mesh.size, processes=jax.process_count())
    source, held_out = _open(data, data["source"]), _open(data, data["eval_source"])
    held_out_crops = center_crops(held_out, crop=data["crop"], count=config["eval"]["num_images"])
    _check_labels(held_out_crops, config, held_out.name)

    with (
        checkpoints.Checkpoints(workdir, keep=config["checkpoint"]["keep"]) as store,
        stop_signals() as stopped,
    ):
        # ---- Restore: the newest checkpoint, else given weights, else fresh ones. Never fresh over a failed restore.
        if store.latest_step is not None:
            _check_same_run(checkpoints.read_config(workdir), config, workdir)
        optimizer = experiment.optimizer()
        state = _initial_state(experiment, optimizer, mesh, store)
        first_step = int(state.step)
        if jax.process_index() == 0:
            checkpoints.write_config(workdir, config)

        # ---- Compile once, for every step.
        step_fn = jit_train_step(
            make_train_step(
                experiment.objective,
                optimizer,
                ema_decay=config["optim"]["ema_decay"],
                accumulation=run["accumulation"],
            ),
            state,
            mesh,
        )
        evaluate = HeldOutEvaluation(
            experiment.objective,
            held_out_crops,
            mesh,
            steps=config["sampling"]["steps"],
            solver=config["sampling"]["solver"],
            seed=run["seed"],
        )
        best = Best(workdir, config, mesh, first_step) if config["checkpoint"]["best"] else None
        key = jax.random.key(run["seed"])
        rows = sharding.local_rows(mesh, run["batch_size"])
        crops = batches(
            source,
            seed=run["seed"],
            batch_size=run["batch_size"],
            crop=data["crop"],
            first_step=first_step,
            rows=rows,
            mirror=data["mirror"],
            threads=data["threads"],
        )

        def next_batch() -> dict[str, jax.Array]:
            crops_here = next(crops)
            _check_labels(crops_here, config, source.name)
            return sharding.to_global(crops_here, mesh, rows=rows, batch_size=run["batch_size"])

        lr_schedule = experiment.lr_schedule()
        minutes = run["minutes"] or None
        writer = MetricWriter(
            workdir,
            total_steps=run["num_steps"],
            first_step=first_step,
            enabled=jax.process_index() == 0,
            minutes=minutes,
        )
        with writer:
            writer.message(_greeting(experiment, state, mesh, source, first_step))
            deadline = time.monotonic() + 60 * minutes if minutes else math.inf
            window = MetricWindow(run["batch_size"])
            pending: tuple[int, Mapping[str, jax.Array]] | None = None

            def book() -> None:
                """Read, check and log the metrics of the step that is dispatched but not read, if any."""
                nonlocal pending
                if pending is None:
                    return
                step, loss, grad_norm = _finite(pending, workdir)
                pending = None
                window.add(loss, grad_norm)
                writer.progress(step, loss=window.loss, images_per_second=window.rate)
                if step % run["log_every"] == 0 or step == run["num_steps"]:
                    writer.write_scalars(
                        step, window.summary() | {"learning_rate": float(lr_schedule(step - 1))}
                    )

            def ending() -> Any:
                """0 to go on, else why any of the processes wants to stop; asked by all at the same step."""
                return sharding.process_max(
                    stopped() or (_TIME_IS_OVER if time.monotonic() > deadline else 0), mesh
                )

            def evaluate_now() -> None:
                values, grid = evaluate(state.ema_params)
                writer.write_scalars(step, values)
                writer.write_image(step, "samples", grid)
                numbers = (f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items())
                writer.message(f"step {step}: held out: {', '.join(numbers)}")
                if best is not None:
                    best(values["eval_psnr"], state.ema_params)

            batch = next_batch()
            step = evaluated = first_step
            reason = int(ending())
            if int(sharding.process_max(int(_evaluation_is_missing(workdir, first_step, config)), mesh)):
                evaluate_now()  # the run was killed between the checkpoint of this step and its evaluation
            while step < run["num_steps"] and not reason:
                # ---- Train: dispatch step n, fetch batch n+1 while it runs, then read the metrics of step n-1.
                asked = ending()  # before the step, so that reading the answer does not wait for it
                before = time.monotonic()
                state, metrics = step_fn(state, batch, key)
                if step == first_step:
                    window.skip(time.monotonic() - before)  # compilation
                step += 1
                before = time.monotonic()
                batch = next_batch()
                window.waited += time.monotonic() - before
                book()
                pending = (step, metrics)
                reason = int(asked)
                # ---- Evaluate and save, on state whose loss is known to be finite
                ends = step == run["num_steps"]
                to_save, to_evaluate = (
                    ends or step % config[section]["every"] == 0 for section in ("checkpoint", "eval")
                )
                if to_save or to_evaluate:
                    book()
                    before = time.monotonic()
                    if to_save:
                        store.save(state)
                    # Told to stop it only saves, and the next start evaluates.
                    if to_evaluate and reason <= _TIME_IS_OVER:
                        evaluate_now()
                        evaluated = step
                    window.skip(time.monotonic() - before)
            # ---- Stop
            book()
            store.save(state, wait=True)
            if reason > _TIME_IS_OVER:
                writer.message(
                    f"Stopped at step {step} and saved. Run the same command again to go on from there."
                )
                return reason
            if step < run["num_steps"]:
                if step > evaluated:
                    evaluate_now()
                writer.message(f"The {minutes:g} minutes are over at step {step}; saved.")
            else:
                writer.message(f"Done: {step} steps, saved in {workdir}.")
    return 0


def _open(data: Mapping[str, Any], name: str) -> Source:
    if data["framing"] == "crop":
        return open_source(name, min_side=data["crop"], cache_mb=data["cache_mb"])
    whole = open_source(name, min_side=data["crop"], cache_mb=0)
    return squares(whole, data["crop"], cache_mb=data["cache_mb"])


def _initial_state(
    experiment: Experiment, optimizer: Any, mesh: Mesh, store: checkpoints.Checkpoints
) -> TrainState:
    if store.latest_step is not None:
        return store.restore(
            abstract_state(experiment.init_params, optimizer, mesh),
            allow_older=experiment.section("checkpoint")["allow_older"],
        )
    start = experiment.section("train")["init_from"]
    key = jax.random.fold_in(jax.random.key(experiment.section("train")["seed"]), 2**31)
    if not start:
        return create_state(experiment.init_params, optimizer, key, mesh)
    given = load(start).params
    abstract = abstract_state(experiment.init_params, optimizer, mesh)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (given, abstract.params)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"config.train.init_from={start!r} is a model of another network; use its config.model fields"
        )
    return start_from(given, optimizer, mesh)


def _check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    for section, fields in FIXED_ON_RESUME.items():
        for field in fields or new[section]:
            # A field that is newer than the run had its default in it.
            value, before = new[section][field], old.get(section, {}).get(field, DEFAULTS[section][field])
            before = tuple(before) if isinstance(before, list) else before
            if before != value:
                raise UserError(
                    f"config.{section}.{field} is {value!r} but {workdir} was trained with {before!r}: "
                    "give that value to go on, or another workdir to start anew"
                )


def _check_labels(rows: Mapping[str, np.ndarray], config: Mapping[str, Any], name: str) -> None:
    classes = config["model"]["num_classes"]
    if classes and "label" not in rows:
        raise UserError(f"config.model.num_classes={classes} but {name} has no labels: set it to 0")
    wrong = [label for label in rows["label"].tolist() if not 0 <= label < classes] if classes else []
    if wrong:
        raise UserError(
            f"config.model.num_classes={classes} but {name} has a label {wrong[0]}: labels go from 0 to "
            "num_classes - 1"
        )


def _finite(pending: tuple[int, Mapping[str, jax.Array]], workdir: Path) -> tuple[int, float, float]:
    """The fetched metrics of a step, or the end of the run: a state with NaN in it is never saved."""
    step, metrics = pending
    loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"the loss of step {step} is {loss} and its gradient's norm {grad_norm}: stopped without saving it; "
            f"the last good checkpoint is in {workdir}. Lower config.optim.learning_rate, raise "
            "config.optim.warmup_steps or set config.optim.clip_norm, in a new workdir"
        )
    return step, loss, grad_norm


def _evaluation_is_missing(workdir: Path, step: int, config: Mapping[str, Any]) -> bool:
    due = step > 0 and (step == config["train"]["num_steps"] or step % config["eval"]["every"] == 0)
    return due and not any(row["step"] == step and "eval_loss" in row for row in read_metrics(workdir))


def _greeting(experiment: Experiment, state: TrainState, mesh: Mesh, source: Source, first_step: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    start = f"going on from step {first_step}" if first_step else "from step 0"
    return (
        f"{count / 1e6:.2f}M parameters, {len(source)} images in {source.name}, "
        f"{mesh.size} {jax.devices()[0].platform} device(s), {start}"
    )
