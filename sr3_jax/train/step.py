"""The training step: low-res images are made on the device, then loss, gradients, update and moving average.

Shape legend: B batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sr3_jax.diffusion.loss import LossNorm, Weighting, denoising_loss
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed.sharding import replicated
from sr3_jax.flops import flops
from sr3_jax.nn.unet import Network, apply_unet
from sr3_jax.train.examples import Batch, Task, make_pair
from sr3_jax.train.state import TrainState, update_ema
from sr3_jax.types import Image, Key, NoiseLevel, Params


@dataclass(frozen=True, eq=False)
class Objective:
    """The training objective. Static at trace time.

    Attributes:
        network: the U-Net.
        schedule: the training schedule.
        space: the diffused variable.
        prediction: what the network predicts: 'eps', 'v' or 'y0'.
        norm: 'l1' or 'l2'.
        weighting: of the loss by gamma; None for equal weights.
        task: how a training example is made from a crop.
    """

    network: Network
    schedule: NoiseSchedule
    space: Space
    prediction: Prediction
    norm: LossNorm
    weighting: Weighting | None
    task: Task


def batch_losses(
    params: Params,
    batch: Batch,
    key: Key,
    *,
    objective: Objective,
    train: bool,
    gamma: NoiseLevel | None = None,
    eps: jax.Array | None = None,
    low_res: Image | None = None,
) -> jax.Array:
    """The denoising loss of each example, [B] float32.

    Args:
        train: apply dropout, label dropout, degradation and augmentation.
        low_res: as for `make_pair`.
        gamma, eps: as for `denoising_loss`.
    """
    pair_key = None
    if train and objective.task.random:
        key, pair_key = jax.random.split(key)
    image, cond = make_pair(batch, objective.task, pair_key, low_res=low_res)
    loss_key, dropout_key = jax.random.split(key)
    return denoising_loss(
        functools.partial(apply_unet, objective.network, params, train=train, dropout_key=dropout_key),
        loss_key,
        image,
        cond,
        schedule=objective.schedule,
        prediction=objective.prediction,
        norm=objective.norm,
        weighting=objective.weighting,
        space=objective.space,
        gamma=gamma,
        eps=eps,
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, Batch, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the function (state, batch of uint8 crops, key of the run) -> (state, {'loss', 'grad_norm'}).

    Step k uses fold_in(key, k), so it is a pure function of the state, the batch and the seed of the run.

    Args:
        ema_decay: of the moving average of the weights.
        accumulation: process the batch in this many parts and average their gradients, to save memory.
    """

    def gradients(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            return jnp.mean(batch_losses(params, batch, key, objective=objective, train=True))

        return jax.value_and_grad(loss)(params)

    def accumulated(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Params]:
        def add(total: Any, part: tuple[Batch, Key]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *part)), None

        # Each part takes every `accumulation`-th row, since contiguous parts would be on a few of the devices only.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 0, 1),
            batch,
        )
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulation)))
        return jax.tree.map(lambda x: x / accumulation, total)

    def train_step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, dict[str, jax.Array]]:
        loss_and_grads = gradients if accumulation == 1 else accumulated
        loss, grads = loss_and_grads(state.params, batch, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, ema_decay)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def jit_train_step(
    train_step: Callable[[TrainState, Batch, Key], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """Compile the training step: the state keeps its shardings and is donated, the metrics are replicated.

    Args:
        state: arrays, or shapes with shardings (`abstract_state`).
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)


def flops_without_remat(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    key: Key,
    *,
    accumulation: int,
) -> float:
    """FLOPs of a training step over all devices, without those that rematerialization repeats; traces the step."""
    plain = replace(objective, network=objective.network.clone(remat=False))
    step = make_train_step(plain, optimizer, ema_decay=0.0, accumulation=accumulation)
    return flops(jax.make_jaxpr(step)(state, batch, key))
