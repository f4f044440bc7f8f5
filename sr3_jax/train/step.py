"""The training step: low-res images are made on the device, then loss, gradients, update and moving average.

Shape legend: B batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sr3_jax.diffusion.loss import LossNorm, PerceptualLoss, Weighting, denoising_loss, sample_noise
from sr3_jax.diffusion.process import Prediction
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.distributed.sharding import replicated
from sr3_jax.flops import flops
from sr3_jax.nn.unet import Network, apply_unet
from sr3_jax.train.examples import Batch, Task, make_pair
from sr3_jax.train.state import TrainState, update_ema
from sr3_jax.types import Image, Key, NoiseLevel, Params

# The training loss is logged in bins of log(gamma / (1 - gamma)), from noise to nearly clean images.
_EDGES = (-6, -4, -2, 0, 2, 4, 6)
_NAMES = [f"m{-edge}" if edge < 0 else f"{edge}" for edge in _EDGES]
LOG_SNR_BINS = tuple(
    f"loss_log_snr_{name}"
    for name in (
        f"below_{_NAMES[0]}",
        *(f"{low}_{high}" for low, high in itertools.pairwise(_NAMES)),
        f"above_{_NAMES[-1]}",
    )
)


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
        perceptual: a loss that is added; None for none.
        task: how a training example is made from a crop.
    """

    network: Network
    schedule: NoiseSchedule
    space: Space
    prediction: Prediction
    norm: LossNorm
    weighting: Weighting | None
    task: Task
    perceptual: PerceptualLoss | None = None


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
) -> tuple[jax.Array, NoiseLevel]:
    """The denoising loss of each example, [B] float32, and its noise level, [B].

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
    if gamma is None:
        gamma, sampled = sample_noise(loss_key, objective.schedule, image.shape)
        eps = sampled if eps is None else eps
    losses = denoising_loss(
        functools.partial(apply_unet, objective.network, params, train=train, dropout_key=dropout_key),
        loss_key,
        image,
        cond,
        schedule=objective.schedule,
        prediction=objective.prediction,
        norm=objective.norm,
        weighting=objective.weighting,
        perceptual=objective.perceptual,
        space=objective.space,
        gamma=gamma,
        eps=eps,
    )
    return losses, gamma


def loss_by_log_snr(losses: jax.Array, gamma: NoiseLevel) -> jax.Array:
    """The sum of the losses in each of LOG_SNR_BINS, and their number, float32 [2, bins]; both inputs are [B]."""
    log_snr = jnp.log(gamma) - jnp.log1p(-gamma)
    index = jnp.searchsorted(jnp.asarray(_EDGES, jnp.float32), log_snr, side="right")
    is_in = jax.nn.one_hot(index, len(LOG_SNR_BINS), dtype=bool)  # [B, bins]
    return jnp.stack([jnp.sum(jnp.where(is_in, losses[:, None], 0.0), axis=0), jnp.sum(is_in, axis=0)])


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulation: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch, Key], tuple[TrainState, dict[str, jax.Array]]]:
    """Make the function (state, batch of uint8 crops, key of the run) -> (state, metrics).

    The metrics are 'loss', 'grad_norm' and 'by_log_snr' (`loss_by_log_snr`), which a regression network, without noise,
    does not have.

    Step k uses fold_in(key, k), so it is a pure function of the state, the batch and the seed of the run.

    Args:
        ema_decay: of the moving average of the weights.
        accumulation: process the batch in this many parts and average their gradients, to save memory.
        skip_nonfinite: a step whose loss or gradient norm is not finite changes nothing but the step number.
    """
    noisy = not objective.network.regression

    def gradients(params: Params, batch: Batch, key: Key) -> tuple[dict[str, jax.Array], Params]:
        def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            losses, gamma = batch_losses(params, batch, key, objective=objective, train=True)
            mean = jnp.mean(losses)
            return mean, {"loss": mean} | ({"by_log_snr": loss_by_log_snr(losses, gamma)} if noisy else {})

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return metrics, grads

    def accumulated(params: Params, batch: Batch, key: Key) -> tuple[dict[str, jax.Array], Params]:
        def add(total: Any, part: tuple[Batch, Key]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *part)), None

        # Each part takes every `accumulation`-th row, since contiguous parts would be on a few of the devices only.
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 0, 1),
            batch,
        )
        bins = {"by_log_snr": jnp.zeros((2, len(LOG_SNR_BINS)))} if noisy else {}
        zero = ({"loss": jnp.zeros(())} | bins, jax.tree.map(jnp.zeros_like, params))
        (metrics, grads), _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulation)))
        metrics["loss"] = metrics["loss"] / accumulation
        return metrics, jax.tree.map(lambda x: x / accumulation, grads)

    def train_step(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, dict[str, jax.Array]]:
        metrics_and_grads = gradients if accumulation == 1 else accumulated
        metrics, grads = metrics_and_grads(state.params, batch, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = update_ema(state.ema_params, params, state.step, ema_decay)
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = TrainState(state.step + 1, params, ema_params, opt_state)
        if skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            old = replace(state, step=new.step)
            new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        return new, metrics

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
