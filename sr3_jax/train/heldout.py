"""What a run says of its progress: loss, PSNR and consistency on held-out crops, and a grid of samples to look at."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr3_jax import parallel
from sr3_jax.aliases import Conditioning, Key, Params
from sr3_jax.diffusion.sampler import sample
from sr3_jax.images import degrade, picture_grid, to_uint8, to_unit, upsample
from sr3_jax.metrics import consistency, psnr
from sr3_jax.model import inference_grid, solver_named
from sr3_jax.train.step import Batch, Objective, batch_losses, condition

GRID_ROWS = 6


def jit_held_out(objective: Objective, mesh: Mesh, *, rows: int, steps: int, solver: str) -> Any:
    """(weights, batch of uint8 crops, key) -> (means over the first `rows` crops, uint8 images of the whole batch)."""
    schedule = inference_grid(objective.schedule, steps, solver)
    network, scale = objective.network, objective.scale

    def metrics(params: Params, batch: Batch, key: Key) -> tuple[dict[str, jax.Array], Batch]:
        loss_key, sample_key = jax.random.split(key)
        image = to_unit(batch["image"])
        low_res = degrade(image, scale)
        cond = condition(low_res, scale, batch.get("label"))

        def denoiser(y_t: jax.Array, gamma: jax.Array, cond: Conditioning) -> jax.Array:
            return network.apply({"params": params}, y_t, gamma, cond)

        output = to_uint8(
            sample(
                denoiser,
                sample_key,
                cond,
                shape=image.shape,
                schedule=schedule,
                solver=solver_named(solver),
                kind=objective.kind,
                space=objective.space,
            ).image
        )
        bicubic, low_res = to_uint8(upsample(low_res, scale)), to_uint8(low_res)
        values = {
            "eval_loss": batch_losses(params, batch, loss_key, objective=objective, train=False),
            "eval_psnr": psnr(output, batch["image"]),
            "eval_psnr_bicubic": psnr(bicubic, batch["image"]),
            "eval_consistency": consistency(output, low_res),
            "eval_consistency_bicubic": consistency(bicubic, low_res),
        }
        means = {name: jnp.mean(value[:rows]) for name, value in values.items()}
        return means, {"low_res": low_res, "bicubic": bicubic, "output": output}

    return jax.jit(metrics, out_shardings=(parallel.replicated(mesh), parallel.batch_sharding(mesh)))


class HeldOut:
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
        self._originals = batch["image"]
        rows = len(self._originals)
        # The devices take equal shares: rows come again to fill them, and are left out of the means.
        filled = np.arange(rows + -rows % mesh.size) % rows
        self._batch = {name: column[filled] for name, column in batch.items()}
        self._seed = seed
        self._mesh = mesh
        self._metrics = jit_held_out(objective, mesh, rows=rows, steps=steps, solver=solver)

    def __call__(self, params: Params) -> tuple[dict[str, float], np.ndarray]:
        """Metrics of these weights, and a grid: low-res, bicubic, output, original."""
        key = jax.random.fold_in(jax.random.key(self._seed), 2**31 + 1)  # the same each time
        values, images = self._metrics(params, parallel.to_global(self._batch, self._mesh), key)
        images = parallel.to_host(images, self._mesh) | {"original": self._originals}
        columns = [images[name] for name in ("low_res", "bicubic", "output", "original")]
        count = min(GRID_ROWS, len(self._originals))
        rows = [[column[row] for column in columns] for row in range(count)]
        grid = picture_grid(rows, column_titles=["low-res", "bicubic", "output", "original"])
        return {name: float(value) for name, value in values.items()}, grid
