"""The reverse loop: from noise to an image, one `lax.scan` for every solver (paper Algorithm 2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sr3_jax.diffusion.process import Prediction, to_y0
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.solvers import Carry, Solver, ancestral
from sr3_jax.diffusion.space import Space, image
from sr3_jax.types import Conditioning, Denoiser, Image, Key


class Samples(NamedTuple):
    """image [B,H,W,C] in [-1,1]; snapshots [K,B,H,W,C]: y_t as an image, not clipped, or None."""

    image: Image
    snapshots: jax.Array | None


def sample(
    denoiser: Denoiser,
    key: Key,
    cond: Conditioning,
    *,
    shape: tuple[int, ...],
    schedule: NoiseSchedule,
    solver: Solver = ancestral(),
    prediction: Prediction = "eps",
    space: Space = image(),
    snapshots: int = 0,
) -> Samples:
    """Draw images from p(y0 | cond) by N = schedule.num_steps reverse steps.

    Pure and traceable; wrap it in `jit` with `out_shardings`, so that each device computes its part of the batch.

    Args:
        denoiser: the network, predicting `prediction`.
        key: one key for the batch, or [B] keys, which make each example independent of its batch.
        cond: passed through to the network.
        shape: (B,H,W,C) of the images.
        schedule: the inference grid, usually `respace(training_schedule, N)`.
        snapshots: keep y_t after every that many steps; 0 keeps none. Only these are held in memory.

    Raises:
        ValueError: `key` is neither one key nor one an example; `snapshots` is negative or above N.
    """
    batch_size, num_steps = shape[0], schedule.num_steps
    if key.shape not in ((), (batch_size,)):
        raise ValueError(f"key must be one key or {batch_size} keys, got shape {key.shape}")
    if not 0 <= snapshots <= num_steps:
        raise ValueError(f"snapshots must be from 0 to the {num_steps} steps, got {snapshots}")

    def denoise(y: jax.Array, gamma: jax.Array) -> jax.Array:
        level = jnp.full((batch_size,), gamma)
        y0_hat = to_y0(denoiser(y, level, cond), y, level, prediction)
        # Inside Heun gamma can be 1 only in the branch that is not taken.
        return space.clip(y0_hat, cond)

    def noise(keys: Key) -> jax.Array:
        if keys.ndim == 0:
            return jax.random.normal(keys, shape)
        return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(keys)

    start, rest = split(key)  # so that y_T is the same for every solver and number of steps
    carry, table = solver.init(schedule, noise(start))
    kept = jnp.zeros((num_steps // snapshots, *shape)) if snapshots else None

    def body(state: tuple[Carry, jax.Array | None], row: tuple) -> tuple[tuple, None]:
        (carry, kept), (index, coefficients) = state, row
        z = noise(_of_step(rest, index)) if solver.stochastic else None
        carry = solver.step(denoise, carry, z, coefficients)
        if kept is not None:
            done = index + 1
            # A step that is not kept writes past the end, where 'drop' ignores it.
            slot = jnp.where(done % snapshots == 0, done // snapshots - 1, len(kept))
            kept = kept.at[slot].set(space.decode(carry.y, cond), mode="drop")
        return (carry, kept), None

    rows = (jnp.arange(num_steps), table)
    (carry, kept), _ = jax.lax.scan(body, (carry, kept), rows)
    return Samples(jnp.clip(space.decode(carry.y, cond), -1.0, 1.0), kept)


def split(key: Key) -> tuple[Key, Key]:
    """Two keys from one, or two [B] from [B]."""
    if key.ndim == 0:
        first, second = jax.random.split(key)
    else:
        first, second = jax.vmap(lambda one: tuple(jax.random.split(one)))(key)
    return first, second


def _of_step(key: Key, index: jax.Array) -> Key:
    if key.ndim == 0:
        return jax.random.fold_in(key, index)
    return jax.vmap(lambda one: jax.random.fold_in(one, index))(key)
