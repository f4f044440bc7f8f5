"""The training run: restore, then for each step train, log, evaluate, save, stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sr3_jax import memory
from sr3_jax.config import schema
from sr3_jax.config.build import profile_window
from sr3_jax.data.batches import batches, center_crops
from sr3_jax.data.sources import DataUnavailable, NoImages, Source, open_source, squares
from sr3_jax.distributed import sharding
from sr3_jax.distributed.signals import stop_signals
from sr3_jax.errors import UserError
from sr3_jax.flops import flops, peak_flops
from sr3_jax.numerics import fixed_numerics
from sr3_jax.train import checkpoints
from sr3_jax.train.examples import Batch
from sr3_jax.train.experiment import Experiment, check_batch
from sr3_jax.train.goodput import Goodput
from sr3_jax.train.held_out import (
    BestCheckpoint,
    HeldOutEvaluation,
    evaluate_and_log,
    evaluation_is_missing,
)
from sr3_jax.train.metric_writer import MetricWriter, check_writers, read_metrics
from sr3_jax.train.profiler import Profiler
from sr3_jax.train.state import (
    TrainState,
    abstract_state,
    create_state,
    parameter_table,
    skipped_steps,
    start_from,
)
from sr3_jax.train.step import flops_without_remat, jit_train_step, make_train_step
from sr3_jax.train.step_metrics import StepMetrics
from sr3_jax.train.weights import load_weights
from sr3_jax.train.workdir import locked_workdir
from sr3_jax.types import Key, Params

_log = logging.getLogger("sr3_jax")
_OUT_OF_TIME = 1  # below the exit codes of signals


@fixed_numerics()
def train(experiment: Experiment, workdir: Path) -> int:
    """Train in a workdir, from its newest checkpoint if it has one.

    Returns:
        0 when the run is complete; 143, 130 or 129 when SIGTERM, Ctrl-C or SIGHUP stopped it after a save.

    Raises:
        UserError: the config does not fit the machine, the data or the workdir; another run uses the workdir; the loss
            is not finite; a checkpoint cannot be saved; a step needs more memory than is free.
    """
    started = time.monotonic()
    config = experiment.config
    num_steps, seed = config["train"]["num_steps"], config["train"]["seed"]
    keep_period = config["checkpoint"]["keep_period"]
    mesh, source, held_out_crops = check_start(experiment, workdir)

    with (
        locked_workdir(workdir, mesh),
        checkpoints.Checkpoints(workdir, keep=config["checkpoint"]["keep"], keep_period=keep_period) as store,
        stop_signals("this step and a save") as signal_code,
    ):
        # ---- Restore
        if store.latest_step is not None:
            check_same_run(checkpoints.read_config(workdir), config, workdir)
        optimizer = experiment.optimizer()
        state = _initial_state(experiment, optimizer, mesh, store)
        step = first_step = evaluated = int(state.step)
        if jax.process_index() == 0:
            checkpoints.write_config(workdir, config)

        # ---- Set up: one compilation for all steps
        train_step = jit_train_step(
            make_train_step(
                experiment.objective,
                optimizer,
                ema_decay=config["optim"]["ema_decay"],
                accumulation=config["train"]["accumulation"],
                skip_nonfinite=config["optim"]["skip_nonfinite"] > 0,
            ),
            state,
            mesh,
        )
        evaluation = HeldOutEvaluation(
            experiment.objective,
            held_out_crops,
            mesh,
            steps=config["sampling"]["steps"],
            solver=config["sampling"]["solver"],
            seed=seed,
            stopped=signal_code,
        )
        best = BestCheckpoint(workdir, config, mesh, first_step) if config["checkpoint"]["best"] else None
        next_batch = _device_batches(source, config, mesh, first_step=first_step).__next__
        minutes = config["train"]["minutes"] or None
        save_clock = _Deadline(config["checkpoint"]["minutes"])
        ask = _vote(mesh, signal_code, _Deadline(config["train"]["minutes"]), save_clock)
        key = jax.random.key(seed)
        goodput = Goodput(read_metrics(workdir), first_step=first_step, started=started)
        with (
            MetricWriter(
                workdir,
                total_steps=num_steps,
                first_step=first_step,
                enabled=jax.process_index() == 0,
                minutes=minutes,
                writers=writer_names(config),
                config=config,
            ) as writer,
            Profiler(
                profile_window(config["train"]), workdir, first_step=first_step, report=writer.message
            ) as profiler,
        ):
            writer.message(_describe(experiment, state, mesh, source, first_step))
            writer.message(parameter_table(state.params))
            metrics = StepMetrics(
                writer,
                batch_size=config["train"]["batch_size"],
                log_every=config["train"]["log_every"],
                num_steps=num_steps,
                lr_schedule=experiment.lr_schedule(),
                workdir=workdir,
                goodput=goodput,
                skip_nonfinite=config["optim"]["skip_nonfinite"],
                skipped=skipped_steps(state),
            )
            goodput.lose("start", time.monotonic() - started)
            with metrics.untimed("start"):
                batch = next_batch()
                reason, _ = _answer(ask())
                missing = int(sharding.process_max(int(evaluation_is_missing(workdir, step, config)), mesh))

            def evaluate() -> bool:
                with metrics.untimed("evaluation"):
                    try:
                        return evaluate_and_log(evaluation, best, writer, step, state.ema_params)
                    except memory.OutOfMemory:
                        if jax.process_count() == 1:  # otherwise the peers may have enough, and do not save
                            store.save(state, wait=True)
                        raise

            if missing and not evaluate():
                reason = signal_code()

            step_metrics: dict[str, jax.Array] = {}
            # ---- Train: dispatch step n, fetch batch n+1 while it runs, then read the metrics of step n-1
            while step < num_steps and not reason:
                with metrics.untimed("start"):
                    profiler.before_step(step, step_metrics)
                vote = ask()  # before the step, so that reading it does not wait for the step
                if step == first_step:
                    with metrics.untimed("start"), writer.busy("compiling the training step"):
                        metrics.step_flops = _compile(train_step, experiment, mesh, state, batch, key)
                        state, step_metrics = train_step(state, batch, key)
                    writer.message(_describe_speed(metrics.step_flops, mesh))
                else:
                    with profiler.step(step):
                        state, step_metrics = train_step(state, batch, key)
                step += 1
                try:
                    with metrics.waiting_for_data(step_metrics):
                        batch = next_batch()
                except DataUnavailable as error:
                    metrics.push(step, step_metrics)
                    metrics.flush()
                    if jax.process_count() == 1:  # otherwise the peers, which have their data, do not save
                        store.save(state, wait=True)
                        raise DataUnavailable(f"saved at step {step}: {error}") from error
                    raise
                metrics.push(step, step_metrics)
                store.check()
                reason, save_now = _answer(vote)

                # ---- Save and evaluate, only a state whose loss is known to be finite
                save, due = (
                    step == num_steps or step % config[section]["every"] == 0
                    for section in ("checkpoint", "eval")
                )
                save |= save_now or (keep_period > 0 and step % keep_period == 0)
                if save or due:
                    metrics.flush()
                if save:
                    with metrics.untimed("checkpoint"):
                        writer.sync()  # a resumed run must find the lines up to its checkpoint
                        store.save(state)
                    save_clock.restart()
                if due and reason <= _OUT_OF_TIME:  # after a signal the next start evaluates
                    if evaluate():
                        evaluated = step
                    else:
                        reason = signal_code()

            # ---- Stop
            def end(text: str) -> None:
                writer.message(f"{goodput.summary()}\n{text}")

            metrics.flush()
            with metrics.untimed("checkpoint"):
                writer.sync()
                store.save(state, wait=True)
            if reason > _OUT_OF_TIME:
                end(f"Stopped and saved at step {step}. Run the same command again to resume.")
                return reason
            if step == num_steps:
                end(f"Finished {step} steps; saved in {workdir}.")
            else:
                if step > evaluated and not evaluate():
                    return signal_code()  # it is saved
                end(f"Stopped after {minutes:g} minutes and saved at step {step}.")
    return 0


def check_start(experiment: Experiment, workdir: Path) -> tuple[Mesh, Source, dict[str, np.ndarray]]:
    """What a run needs besides its workdir: the mesh, the training source and the crops of held-out evaluation.

    Raises:
        UserError: the config does not fit the devices or the data.
    """
    config = experiment.config
    check_writers(writer_names(config))
    mesh = sharding.make_mesh(**config["mesh"], state_bytes=experiment.state_bytes)
    check_batch(config, devices=mesh.size, processes=jax.process_count())
    try:
        return mesh, *_open_data(config)
    except NoImages as error:
        if checkpoints.newest_step(workdir) is None:
            raise
        raise DataUnavailable(str(error)) from error  # the run has had its data: storage may come back


def writer_names(config: Mapping[str, Any]) -> list[str]:
    """The names in `config.train.writers`."""
    return config["train"]["writers"].split("+")


def _open_data(config: Mapping[str, Any]) -> tuple[Source, dict[str, np.ndarray]]:
    """The training source, and the crops of held-out evaluation with their labels checked."""
    data = config["data"]

    def source(name: str) -> Source:
        if data["framing"] == "crop":
            return open_source(name, min_side=data["crop"], cache_mb=data["cache_mb"], scale=data["scale"])
        whole = open_source(name, min_side=data["crop"], cache_mb=0)
        return squares(whole, data["crop"], cache_mb=data["cache_mb"])

    training, held_out = source(data["source"]), source(data["eval_source"])
    crops = center_crops(held_out, crop=data["crop"], count=config["eval"]["num_images"])
    check_labels(crops, config, held_out.name)
    return training, crops


def _device_batches(
    source: Source, config: Mapping[str, Any], mesh: Mesh, *, first_step: int
) -> Iterator[dict[str, jax.Array]]:
    """Batches from `first_step` on, as global arrays over the mesh; each process decodes only its own rows."""
    train, data = config["train"], config["data"]
    rows = sharding.local_rows(mesh, train["batch_size"])
    for crops in batches(
        source,
        seed=train["seed"],
        batch_size=train["batch_size"],
        crop=data["crop"],
        first_step=first_step,
        rows=rows,
        mirror=data["mirror"],
        threads=data["threads"],
    ):
        check_labels(crops, config, source.name)
        yield sharding.to_global(crops, mesh, rows=rows, batch_size=train["batch_size"])


class _Deadline:
    """Whether this many minutes have passed since the start; never with 0."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes or math.inf
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + self._seconds

    def passed(self) -> bool:
        return time.monotonic() > self._end


def _vote(mesh: Mesh, signal_code: Callable[[], int], run: _Deadline, save: _Deadline) -> Callable[[], Any]:
    """A function that asks all processes at the same step whether one wants to stop, and process 0 whether to save.

    `_answer` of its result waits for the answer.
    """

    def vote() -> Any:
        reason = signal_code() or (_OUT_OF_TIME if run.passed() else 0)
        # In one number, of which the largest wins: a run that stops saves in any case.
        return sharding.process_max(2 * reason + (jax.process_index() == 0 and save.passed()), mesh)

    return vote


def _answer(vote: Any) -> tuple[int, bool]:
    """0 to go on, the exit code of a signal, or _OUT_OF_TIME; and whether to save now."""
    reason, save = divmod(int(vote), 2)
    return reason, bool(save)


def _initial_state(
    experiment: Experiment, optimizer: Any, mesh: Mesh, store: checkpoints.Checkpoints
) -> TrainState:
    if store.latest_step is not None:
        return store.restore(
            abstract_state(experiment.init_params, optimizer, mesh),
            allow_older=experiment.section("checkpoint")["allow_older"],
        )
    key = jax.random.fold_in(jax.random.key(experiment.section("train")["seed"]), 2**31)
    given = starting_weights(experiment, key)
    if given is None:
        return create_state(experiment.init_params, optimizer, key, mesh)
    return start_from(given, optimizer, mesh)


def starting_weights(experiment: Experiment, key: Key) -> Params | None:
    """The weights of `config.train.init_from`; None for a new model.

    Args:
        key: for inputs of the network that these weights do not have.

    Raises:
        UserError: there is no such model, or it has another network.
    """
    start = experiment.section("train")["init_from"]
    if not start:
        return None
    given = dict(load_weights(start).params)
    abstract = jax.eval_shape(experiment.init_params, key)
    if experiment.section("model")["augment"] and "augment_out" not in given:
        new = experiment.init_params(key)  # this input has no effect at first
        given |= {name: new[name] for name in ("augment_in", "augment_out")}
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (given, abstract)]
    if shapes[0] != shapes[1]:
        raise UserError(f"config.train.init_from={start!r} has another network: use its config.model fields")
    return given


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    """UserError if a field that is fixed for a run differs between its stored config and the one that is given."""
    for section, name, field in schema.fields():
        before, value = old[section][name], new[section][name]
        if field.fixed and before != value:
            raise UserError(
                f"config.{section}.{name} is {value!r} but {workdir} was trained with {before!r}: use that value "
                "to resume the run, or start a new workdir"
            )


def check_labels(rows: Mapping[str, np.ndarray], config: Mapping[str, Any], name: str) -> None:
    """UserError if the network needs labels and a batch of the source `name` has none, or one out of range."""
    classes = config["model"]["num_classes"]
    if classes and "label" not in rows:
        raise UserError(f"config.model.num_classes={classes} but {name} has no labels: set it to 0")
    wrong = [label for label in rows["label"].tolist() if not 0 <= label < classes] if classes else []
    if wrong:
        raise UserError(
            f"config.model.num_classes={classes} but {name} has label {wrong[0]}: labels must be from 0 to "
            "num_classes - 1"
        )


def _describe(experiment: Experiment, state: TrainState, mesh: Mesh, source: Source, first_step: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    start = f"resuming at step {first_step}" if first_step else "starting at step 0"
    return (
        f"{count / 1e6:.2f} M parameters, {len(source)} images in {source.name}, "
        f"{mesh.size} {jax.devices()[0].platform} device(s), {start}"
    )


def _compile(
    train_step: Any, experiment: Experiment, mesh: Mesh, state: TrainState, batch: Batch, key: Key
) -> float:
    """Compile the training step, check that it fits into memory, and count its FLOPs on each device."""
    traced = train_step.trace(state, batch, key)
    memory.require(
        memory.needed_bytes(traced.lower().compile()),
        mesh.local_devices,
        what="a training step",
        remedy="use a smaller config.train.batch_size or config.data.crop, a larger "
        "config.train.accumulation, or config.model.remat",
    )
    if not experiment.section("model")["remat"]:
        return flops(traced.jaxpr) / mesh.size
    whole = flops_without_remat(
        experiment.objective,
        experiment.optimizer(),
        state,
        batch,
        key,
        accumulation=experiment.section("train")["accumulation"],
    )
    return whole / mesh.size


def _describe_speed(step_flops: float, mesh: Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    peak = peak_flops(kind)
    known = f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown, so MFU is not logged"
    return f"{step_flops / 1e12:.3g} TFLOPs a step on each device; bfloat16 peak of {kind!r}: {known}"
