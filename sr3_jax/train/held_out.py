"""Held-out evaluation during training: loss, PSNR and consistency on fixed crops, and a grid of samples.

Shape legend: B batch, H height, W width.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr3_jax import memory
from sr3_jax.diffusion.sampler import sample
from sr3_jax.diffusion.schedule import sample_gamma
from sr3_jax.distributed import sharding
from sr3_jax.image_io.grid import image_grid
from sr3_jax.image_ops import pad_batch, to_uint8, upsample
from sr3_jax.metrics import consistency, psnr
from sr3_jax.nn.unet import apply_unet
from sr3_jax.sampling import Sampling
from sr3_jax.train.examples import Batch, condition
from sr3_jax.train.metric_writer import MetricWriter, read_metrics
from sr3_jax.train.step import Objective, batch_losses
from sr3_jax.train.weights import export
from sr3_jax.types import Image, Key, Params

GRID_ROWS = 6
_POLL = 0.02  # seconds between two questions whether to stop
LOSS_LEVELS = 32  # least number of noise levels that the held-out loss is averaged over
GRID_COLUMNS = {
    "low_res": "low-res",
    "bicubic": "bicubic",
    "output": "output",
    "ground_truth": "ground truth",
}
BEST_FILE = "best.safetensors"


def held_out_jit(objective: Objective, mesh: Mesh, *, rows: int, steps: int, solver: str) -> Any:
    """The jitted evaluation: (params, batch of uint8 crops, key) -> (metrics, images).

    Metrics are means over the first `rows` crops, which the rest of the batch repeats; images are uint8 [B,H,W,3], of
    the whole batch, by name. All noise is generated for `rows` crops, so that the metrics do not depend on how far the
    batch is filled up for the devices.
    """
    sampling = Sampling(solver, steps)
    network, task = objective.network, objective.task

    passes = -(-LOSS_LEVELS // rows)

    def loss(params: Params, batch: Batch, low_res: Image | None, key: Key, repeated: jax.Array) -> jax.Array:
        """[B] mean loss over `passes` stratified noise levels per crop."""
        gamma_key, passes_key = jax.random.split(key)
        levels = sample_gamma(gamma_key, objective.schedule, passes * rows).reshape(passes, rows)
        shape = jax.eval_shape(task.target, batch).shape[1:]

        def one_pass(levels_and_key: tuple[jax.Array, Key]) -> jax.Array:
            level, key = levels_and_key
            eps_key, key = jax.random.split(key)
            eps = jax.random.normal(eps_key, (rows, *shape))
            losses, _ = batch_losses(
                params,
                batch,
                key,
                objective=objective,
                train=False,
                gamma=level[repeated],
                eps=eps[repeated],
                low_res=low_res,
            )
            return losses

        return jnp.mean(jax.lax.map(one_pass, (levels, jax.random.split(passes_key, passes))), axis=0)

    def metrics(params: Params, batch: Batch, key: Key) -> tuple[dict[str, jax.Array], Batch]:
        params = sharding.gathered(params, mesh)
        loss_key, sample_key = jax.random.split(key)
        image = task.target(batch)
        repeated = jnp.arange(len(image)) % rows
        # Example i has the same degradation in every evaluation and every run.
        low_res = task.low_res(batch, image, jax.random.split(jax.random.key(0), rows)[repeated])
        cond = condition(low_res, task.scale, batch.get("label"), upsampling=task.upsampling)
        output = to_uint8(
            sample(
                functools.partial(apply_unet, network, params),
                jax.random.split(sample_key, rows)[repeated],
                cond,
                shape=image.shape,
                schedule=sampling.grid(objective.schedule),
                solver=sampling.make_solver(),
                prediction=objective.prediction,
                space=objective.space,
            ).image
        )
        truth = to_uint8(image)
        values = {"eval_loss": loss(params, batch, low_res, loss_key, repeated)}
        images = {"output": output, "ground_truth": truth}
        if low_res is not None and task.scale is not None:
            bicubic, small = to_uint8(upsample(low_res, task.scale)), to_uint8(low_res)
            values |= {
                "eval_psnr": psnr(output, truth),
                "eval_psnr_bicubic": psnr(bicubic, truth),
                "eval_consistency": consistency(output, small),
                "eval_consistency_bicubic": consistency(bicubic, small),
            }
            images = {"low_res": small, "bicubic": bicubic, **images}
        return {name: jnp.mean(value[:rows]) for name, value in values.items()}, images

    return jax.jit(metrics, out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)))


class HeldOutEvaluation:
    """Evaluates weights on a fixed set of crops with fixed keys, so that metrics compare across steps and runs.

    Args:
        batch: host crops, as `data.batches.center_crops` makes them; any B.
        steps: number of sampling steps.
        solver: name of the solver.
        stopped: asked during an evaluation; it is left as soon as the answer is not 0. Only without other processes,
            which would wait for this one.
    """

    def __init__(
        self,
        objective: Objective,
        batch: dict[str, np.ndarray],
        mesh: Mesh,
        *,
        steps: int,
        solver: str,
        seed: int,
        stopped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._stopped = stopped if jax.process_count() == 1 else lambda: 0
        self._rows = rows = len(batch["image"])
        # Each device takes an equal share; padded rows are left out of the means.
        size = rows + -rows % mesh.size
        self._batch = {name: pad_batch(column, size) for name, column in batch.items()}
        self._seed, self._mesh = seed, mesh
        self._metrics = held_out_jit(objective, mesh, rows=rows, steps=steps, solver=solver)
        self._fits = False  # into memory; not known yet

    def __call__(self, params: Params) -> tuple[dict[str, float], np.ndarray] | None:
        """Metrics of these weights, and a grid of samples next to their ground truth, uint8 [H,W,3]; None if left.

        Raises:
            OutOfMemory: it does not fit into what is free on the devices.
        """
        key = jax.random.fold_in(jax.random.key(self._seed), 2**31 + 1)  # the same each time
        batch = sharding.to_global(self._batch, self._mesh)
        if not self._fits:
            memory.require(
                memory.needed_bytes(self._metrics.lower(params, batch, key).compile()),
                self._mesh.local_devices,
                what="a held-out evaluation",
                remedy="use a smaller config.eval.num_images or config.data.crop",
            )
            self._fits = True
        values, images = self._metrics(params, batch, key)
        while not all(array.is_ready() for array in (*values.values(), *images.values())):
            if self._stopped():  # the device goes on, which the end of the process does not wait for
                return None
            time.sleep(_POLL)
        images = sharding.to_host(images, self._mesh)
        names = [name for name in GRID_COLUMNS if name in images]
        grid = image_grid(
            [[images[name][row] for name in names] for row in range(min(GRID_ROWS, self._rows))],
            column_titles=[GRID_COLUMNS[name] for name in names],
        )
        return {name: float(value) for name, value in values.items()}, grid


class BestCheckpoint:
    """Exports the weights with the highest held-out PSNR as WORKDIR/best.safetensors.

    This is how the paper selects its regression baseline (section 4).

    Args:
        config: stored in the file next to the weights.
        first_step: of a resumed run; evaluations logged up to it count, later ones will be run again.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], mesh: Mesh, first_step: int) -> None:
        self._path, self._config, self._mesh = workdir / BEST_FILE, config, mesh
        rows = (row for row in read_metrics(workdir) if row["step"] <= first_step)
        self._psnr = max((row["eval_psnr"] for row in rows if "eval_psnr" in row), default=float("-inf"))

    def __call__(self, psnr: float, ema_params: Params) -> None:
        """Export these weights if their PSNR is the highest so far. All processes must call it."""
        if psnr <= self._psnr:
            return
        self._psnr = psnr
        params = sharding.to_host(ema_params, self._mesh)
        if jax.process_index() == 0:
            export(self._path, params, self._config)


def evaluate_and_log(
    evaluation: HeldOutEvaluation,
    best: BestCheckpoint | None,
    writer: MetricWriter,
    step: int,
    ema_params: Params,
) -> bool:
    """Evaluate the weights of a step; write samples, the weights if they are the best so far, and metrics.

    Returns False if a stop signal ended the evaluation early; nothing is written then.

    The metrics come last: a line in the log means that everything else of this evaluation is on disk, so a run that is
    killed in between evaluates the step again.
    """
    with writer.busy("evaluating held-out images"):
        result = evaluation(ema_params)
    if result is None:
        return False
    values, grid = result
    writer.write_image(step, "samples", grid)
    if best is not None:
        best(values["eval_psnr"], ema_params)
    writer.write_scalars(step, values)
    numbers = (f"{name.removeprefix('eval_')} {value:.4g}" for name, value in values.items())
    writer.message(f"step {step}: held out: {', '.join(numbers)}")
    return True


def evaluation_is_missing(workdir: Path, step: int, config: Mapping[str, Any]) -> bool:
    """Whether an evaluation was due at `step` but is not in the log: the run was killed before it."""
    due = step > 0 and (step == config["train"]["num_steps"] or step % config["eval"]["every"] == 0)
    return due and not any(row["step"] == step and "eval_loss" in row for row in read_metrics(workdir))
