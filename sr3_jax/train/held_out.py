"""What a run says of its progress: loss, PSNR and consistency on held-out crops, and a grid of samples to look at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr3_jax.diffusion.sampler import sample
from sr3_jax.distributed import sharding
from sr3_jax.image_ops import image_grid, to_uint8, upsample
from sr3_jax.metrics import consistency, psnr
from sr3_jax.sampling import Sampling
from sr3_jax.train.examples import Batch, condition
from sr3_jax.train.step import Objective, batch_losses
from sr3_jax.types import Conditioning, Key, Params

GRID_ROWS = 6
COLUMNS = ("low_res", "bicubic", "output", "original")


def held_out_jit(objective: Objective, mesh: Mesh, *, rows: int, steps: int, solver: str) -> Any:
    """(weights, batch of uint8 crops, key) -> (means over the first `rows` crops, uint8 images of the whole batch)."""
    sampling = Sampling(solver, steps)
    network, task = objective.network, objective.task

    def metrics(params: Params, batch: Batch, key: Key) -> tuple[dict[str, jax.Array], Batch]:
        loss_key, sample_key = jax.random.split(key)
        image = task.target(batch)
        low_res = task.low_res(image)
        cond = condition(low_res, task.scale, batch.get("label"))

        def denoiser(y_t: jax.Array, gamma: jax.Array, cond: Conditioning) -> jax.Array:
            return network.apply({"params": params}, y_t, gamma, cond)

        output = to_uint8(
            sample(
                denoiser,
                sample_key,
                cond,
                shape=image.shape,
                schedule=sampling.grid(objective.schedule),
                solver=sampling.make_solver(),
                prediction=objective.prediction,
                space=objective.space,
            ).image
        )
        original = to_uint8(image)
        values = {"eval_loss": batch_losses(params, batch, loss_key, objective=objective, train=False)}
        images = {"output": output, "original": original}
        if low_res is not None and task.scale is not None:
            bicubic, small = to_uint8(upsample(low_res, task.scale)), to_uint8(low_res)
            values |= {
                "eval_psnr": psnr(output, original),
                "eval_psnr_bicubic": psnr(bicubic, original),
                "eval_consistency": consistency(output, small),
                "eval_consistency_bicubic": consistency(bicubic, small),
            }
            images = {"low_res": small, "bicubic": bicubic, **images}
        return {name: jnp.mean(value[:rows]) for name, value in values.items()}, images

    return jax.jit(metrics, out_shardings=(sharding.replicated(mesh), sharding.batch_sharding(mesh)))


class HeldOutEvaluation:
    """A fixed set of crops and fixed keys, so that its numbers compare across steps and runs.

    Args:
        batch: host crops, uint8 'image' [B,crop,crop,3] and perhaps 'label'; any B.
        steps, solver: of the sampler.
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
    ) -> None:
        self._rows = rows = len(batch["image"])
        # The devices take equal shares: rows come again to fill them, and are left out of the means.
        filled = np.arange(rows + -rows % mesh.size) % rows
        self._batch = {name: column[filled] for name, column in batch.items()}
        self._seed = seed
        self._mesh = mesh
        self._metrics = held_out_jit(objective, mesh, rows=rows, steps=steps, solver=solver)

    def __call__(self, params: Params) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of these weights, and a grid: low-res and bicubic unless it is a base stage, output, original."""
        key = jax.random.fold_in(jax.random.key(self._seed), 2**31 + 1)  # the same each time
        values, images = self._metrics(params, sharding.to_global(self._batch, self._mesh), key)
        images = sharding.to_host(images, self._mesh)
        names = [name for name in COLUMNS if name in images]
        count = min(GRID_ROWS, self._rows)
        grid = image_grid(
            [[images[name][row] for name in names] for row in range(count)],
            column_titles=[name.replace("_", "-") for name in names],
        )
        return {name: float(value) for name, value in values.items()}, grid
