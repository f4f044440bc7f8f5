"""The training run: restore, then for each step: train, log, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sr3_jax import checkpoint, parallel
from sr3_jax.aliases import UserError
from sr3_jax.data.batches import batches, center_crops
from sr3_jax.data.sources import Source, open_source, squares
from sr3_jax.experiment import Experiment, check_batch
from sr3_jax.model import load
from sr3_jax.report import Report
from sr3_jax.train.heldout import HeldOut
from sr3_jax.train.state import TrainState, abstract_state, create_state
from sr3_jax.train.step import make_train_step

_log = logging.getLogger("sr3_jax")
SAME_ON_RESUME = ("model", "diffusion", "optim")


def train(experiment: Experiment, workdir: Path) -> int:
    """Run an experiment in a workdir, from its newest checkpoint if it has one.

    Returns:
        0 when the run is complete, 143 or 130 when SIGTERM or Ctrl-C stopped it after a save.

    Raises:
        UserError: the config does not fit the machine, the data or the workdir; the loss is not finite.
    """
    config = experiment.config
    run, data = config["train"], config["data"]
    mesh = parallel.make_mesh(**config["mesh"])
    check_batch(config, devices=mesh.size, processes=jax.process_count())
    source, held_out = _open(data, data["source"]), _open(data, data["eval_source"])
    _check_labels(experiment, source[0])

    with (
        checkpoint.Checkpoints(workdir, keep=config["checkpoint"]["keep"]) as checkpoints,
        _signals() as stopped,
    ):
        # ---- Restore: the newest checkpoint, else given weights, else fresh ones. Never fresh over a failed restore.
        first_step = checkpoints.latest_step or 0
        if checkpoints.latest_step is not None:
            _check_same_run(checkpoint.read_config(workdir), config, workdir)
        optimizer = experiment.optimizer()
        state = _initial_state(experiment, optimizer, mesh, checkpoints)
        checkpoint.write_config(workdir, config)

        # ---- Compile once, for every step.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_fn = jax.jit(
            make_train_step(
                experiment.objective,
                optimizer,
                ema_decay=config["optim"]["ema_decay"],
                accumulation=run["accumulation"],
            ),
            out_shardings=(shardings, parallel.replicated(mesh)),
            donate_argnums=0,
        )
        evaluate = HeldOut(
            experiment.objective,
            center_crops(held_out, crop=data["crop"], count=config["eval"]["num_images"]),
            mesh,
            steps=config["eval"]["steps"],
            solver=config["eval"]["solver"],
            seed=run["seed"],
        )
        key = jax.random.key(run["seed"])
        host_batches = batches(
            source,
            seed=run["seed"],
            batch_size=run["batch_size"],
            crop=data["crop"],
            first_step=first_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=data["threads"],
        )
        lr_schedule = experiment.lr_schedule()
        minutes = run["minutes"] or None
        report = Report(
            workdir,
            total_steps=run["num_steps"],
            first_step=first_step,
            enabled=jax.process_index() == 0,
            minutes=minutes,
        )
        with report:
            report.message(_greeting(experiment, state, mesh, source, first_step))
            deadline = time.monotonic() + 60 * minutes if minutes else math.inf
            window = _Window(run["batch_size"])
            batch = parallel.to_global(next(host_batches), mesh)
            pending: tuple[int, Mapping[str, jax.Array]] | None = None
            step = first_step
            while step < run["num_steps"] and time.monotonic() < deadline and stopped() is None:
                # ---- Train: dispatch step n, fetch batch n+1 while it runs, then read the metrics of step n-1.
                state, metrics = step_fn(state, batch, key)
                step += 1
                waited = time.monotonic()
                batch = parallel.to_global(next(host_batches), mesh)
                window.waited += time.monotonic() - waited
                if pending is not None:
                    window.add(*_finite(pending, workdir))
                    report.progress(pending[0], loss=window.loss, images_per_second=window.rate)
                pending = (step, metrics)
                # ---- Log
                if step % run["log_every"] == 0:
                    values = window.summary() | {"learning_rate": float(lr_schedule(step - 1))}
                    report.scalars(step, values)
                # ---- Evaluate and save, on state whose loss is known to be finite
                last = step == run["num_steps"]
                if step % config["eval"]["every"] == 0 or step % config["checkpoint"]["every"] == 0 or last:
                    window.add(*_finite(pending, workdir))
                    pending = None
                    if step % config["checkpoint"]["every"] == 0 or last:
                        checkpoints.save(state)
                    if step % config["eval"]["every"] == 0 or last:
                        _evaluate(evaluate, state, step, report)
                    window.restart()
            # ---- Stop
            if pending is not None:
                _finite(pending, workdir)
            checkpoints.save(state, wait=True)
            reason = stopped()
            if reason is not None:
                report.message(
                    f"Stopped at step {step} and saved. Run the same command again to go on from there."
                )
                return 128 + reason
            if step < run["num_steps"]:
                _evaluate(evaluate, state, step, report)
                report.message(f"The {minutes:g} minutes are over at step {step}; saved.")
            else:
                report.message(f"Done: {step} steps, saved in {workdir}.")
    return 0


def _open(data: Mapping[str, Any], name: str) -> Source:
    if data["framing"] == "crop":
        return open_source(name, min_side=data["crop"], cache_mb=data["cache_mb"])
    whole = open_source(name, min_side=data["crop"], cache_mb=0)
    return squares(whole, data["crop"], cache_mb=data["cache_mb"])


def _initial_state(
    experiment: Experiment, optimizer: Any, mesh: Mesh, checkpoints: checkpoint.Checkpoints
) -> TrainState:
    if checkpoints.latest_step is not None:
        return checkpoints.restore(abstract_state(experiment.init_params, optimizer, mesh))
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
    return create_state(lambda key: jax.tree.map(jnp.asarray, given), optimizer, key, mesh)


def _check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    for section in SAME_ON_RESUME:
        for field, value in new[section].items():
            before = old.get(section, {}).get(field)
            before = tuple(before) if isinstance(before, list) else before
            if before != value:
                raise UserError(
                    f"config.{section}.{field} is {value!r} but {workdir} was trained with {before!r}: "
                    "give that value to go on, or another workdir to start anew"
                )


def _check_labels(experiment: Experiment, element: Mapping[str, Any]) -> None:
    classes = experiment.objective.network.num_classes
    if classes and "label" not in element:
        raise UserError(f"config.model.num_classes={classes} but the data set has no labels: set it to 0")


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


def _evaluate(evaluate: HeldOut, state: TrainState, step: int, report: Report) -> None:
    values, grid = evaluate(state.ema_params)
    report.scalars(step, values)
    report.images(step, "samples", grid)
    numbers = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items())
    report.message(f"step {step}: held out: {numbers}")


def _greeting(experiment: Experiment, state: TrainState, mesh: Mesh, source: Source, first_step: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    start = f"going on from step {first_step}" if first_step else "from step 0"
    return (
        f"{count / 1e6:.2f}M parameters, {len(source)} pictures in {source.name}, "
        f"{mesh.size} {jax.devices()[0].platform} device(s), {start}"
    )


class _Window:
    """Means over the steps since the last log line, and the time they took."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.loss = self.rate = None
        self.restart()

    def restart(self) -> None:
        """Begin again now: evaluation and saving are not the training's time."""
        self._losses, self._norms, self.waited = [], [], 0.0
        self._start = time.monotonic()

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        seconds = time.monotonic() - self._start
        self.rate = len(self._losses) * self._batch_size / max(seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """Means of the window; `data_wait` is the share of time spent waiting for batches."""
        count, seconds = max(1, len(self._losses)), max(time.monotonic() - self._start, 1e-9)
        values = {
            "loss": sum(self._losses) / count,
            "grad_norm": sum(self._norms) / count,
            "step_ms": 1e3 * seconds / count,
            "images_per_second": count * self._batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.restart()
        return values


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Within it SIGINT and SIGTERM only set the value that the yielded function gives; a second one acts at once."""
    caught: list[int] = []

    def handler(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)
