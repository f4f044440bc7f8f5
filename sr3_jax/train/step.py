"""One training step and one held-out loss: degrade on the device, loss, gradients, update, moving average.

Shape legend: B batch, A accumulation, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from sr3_jax.nn.unet import UNet
from sr3_jax.train.examples import Batch, Task, make_pair
from sr3_jax.train.state import TrainState, update_ema
from sr3_jax.types import Conditioning, Key, Params


@dataclass(frozen=True, eq=False)
class Objective:
    """What the network is trained to do; all of it fixed at trace time.

    Attributes:
        task: what a training example is.
    """

    network: UNet
    schedule: NoiseSchedule
    space: Space
    prediction: Prediction
    norm: LossNorm
    weighting: Weighting | None
    task: Task


def batch_losses(params: Params, batch: Batch, key: Key, *, objective: Objective, train: bool) -> jax.Array:
    """[B] the denoising loss of each example; dropout, of labels too, and augmentation are on when `train`."""
    pair_key = None
    if train and objective.task.random:
        key, pair_key = jax.random.split(key)
    image, cond = make_pair(batch, objective.task, pair_key)
    loss_key, dropout_key = jax.random.split(key)

    def denoiser(y_t: jax.Array, gamma: jax.Array, cond: Conditioning) -> jax.Array:
        return objective.network.apply(
            {"params": params}, y_t, gamma, cond, train=train, rngs={"dropout": dropout_key}
        )

    return denoising_loss(
        denoiser,
        loss_key,
        image,
        cond,
        schedule=objective.schedule,
        prediction=objective.prediction,
        norm=objective.norm,
        weighting=objective.weighting,
        space=objective.space,
    )


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
) -> Callable[[TrainState, Batch, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """(state, batch of uint8 crops, the run's key) -> (state, {'loss', 'grad_norm'}).

    Step k draws from fold_in(key, k), so it is a pure function of the state, the batch and the run's seed.
    With accumulation A the batch is worked through in A parts, whose gradients are averaged: memory of B/A.
    """

    def gradients(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Params]:
        def loss(params: Params) -> jax.Array:
            return jnp.mean(batch_losses(params, batch, key, objective=objective, train=True))

        return jax.value_and_grad(loss)(params)

    def accumulated(params: Params, batch: Batch, key: Key) -> tuple[jax.Array, Params]:
        def add(total: Any, part: tuple[Batch, Key]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *part)), None

        # Part a takes every A-th row: contiguous parts would each lie on a few of the devices alone.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 0, 1),
            batch,
        )
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulation)))
        return jax.tree.map(lambda x: x / accumulation, total)

    def train_step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, dict[str, jax.Array]]:
        whole = gradients if accumulation == 1 else accumulated
        loss, grads = whole(state.params, batch, jax.random.fold_in(key, state.step))
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
    """The step as every machine runs it: the new state where the old one was, the metrics on every device.

    Args:
        state: arrays, or shapes with shardings (`abstract_state`); its buffers are given to the new one.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(train_step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)
