"""The reverse loop: from noise to an image with one `lax.scan` for every solver (paper, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sr3_jax.diffusion.process import Prediction, to_y0
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.solvers import Carry, Solver, SolverStep, ancestral
from sr3_jax.diffusion.space import Space, image
from sr3_jax.types import Conditioning, Denoiser, Image, Key


class Samples(NamedTuple):
    """Result of `sample`.

    Attributes:
        image: [B,H,W,C] float32 in [-1,1].
        snapshots: [K,B,H,W,C], y_t as an image, not clipped; None unless requested.
    """

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
    """Sample images from p(y0 | cond) with N = schedule.num_steps reverse steps.

    Pure and traceable: wrap it in `jax.jit` with `out_shardings`, so that each device computes its part of the batch.

    Args:
        denoiser: the network; it predicts `prediction`, and perhaps its variance in a second half of the channels,
            which only `ancestral_learned` reads.
        key: one key for the batch, or [B] keys, which make each example independent of the rest of its batch.
        cond: conditioning, passed through to the network.
        shape: (B,H,W,C) of the images.
        schedule: the inference schedule, usually `respace(training_schedule, N)`.
        solver: one of `ancestral`, `ddpm`, `ddim`, `dpmpp_2m`, `heun`, or your own.
        prediction: what the network predicts: 'eps', 'v' or 'y0'.
        space: the diffused variable: the image, or its residual to the upsampled low-res image.
        snapshots: keep y_t after every `snapshots` steps; 0 keeps none. Only these are held in memory.

    Returns:
        The images. Where the network's output is not finite, infinite included, they are NaN.

    Raises:
        ValueError: `key` is neither one key nor one per example; `snapshots` is negative or above N; the solver needs a
            variance that the network does not predict.
    """
    return sample_with_coefficients(
        denoiser,
        key,
        cond,
        shape=shape,
        coefficients=solver.coefficients(schedule),
        step=solver.compiled,
        prediction=prediction,
        space=space,
        snapshots=snapshots,
    )


def sample_with_coefficients(
    denoiser: Denoiser,
    key: Key,
    cond: Conditioning,
    *,
    shape: tuple[int, ...],
    coefficients: Any,
    step: SolverStep,
    prediction: Prediction = "eps",
    space: Space = image(),
    snapshots: int = 0,
    noise: Callable[[Key], jax.Array] | None = None,
) -> Samples:
    """`sample`, given the rows of `Solver.coefficients` and `Solver.compiled`.

    With the coefficients as an argument of a jitted function, and the step static, all grids of one length and all
    options of a solver share one compilation.

    Args:
        noise: key, or [B] keys, to standard normal noise [B,H,W,C]; None for `jax.random.normal`.
    """
    num_steps = len(jax.tree.leaves(coefficients)[0])
    if not 0 <= snapshots <= num_steps:
        raise ValueError(f"snapshots must be from 0 to the {num_steps} steps, got {snapshots}")
    start, advance = _reverse_process(
        denoiser, key, cond, shape=shape, step=step, prediction=prediction, space=space, noise=noise
    )
    carry = start()
    kept = jnp.zeros((num_steps // snapshots, *shape)) if snapshots else None

    def body(state: tuple[Carry, jax.Array | None], row: tuple) -> tuple[tuple, None]:
        (carry, kept), (index, coefficient) = state, row
        carry = advance(carry, index, coefficient)
        if kept is not None:
            done = index + 1
            # A step that is not kept writes past the end, where 'drop' ignores it.
            slot = jnp.where(done % snapshots == 0, done // snapshots - 1, len(kept))
            kept = kept.at[slot].set(space.decode(carry.y, cond), mode="drop")
        return (carry, kept), None

    rows = (jnp.arange(num_steps), coefficients)
    (carry, kept), _ = jax.lax.scan(body, (carry, kept), rows)
    return Samples(jnp.clip(space.decode(carry.y, cond), -1.0, 1.0), kept)


def sample_part(
    denoiser: Denoiser,
    key: Key,
    cond: Conditioning,
    carry: Carry | None,
    first: jax.Array,
    last: jax.Array,
    *,
    shape: tuple[int, ...],
    coefficients: Any,
    step: SolverStep,
    prediction: Prediction = "eps",
    space: Space = image(),
    noise: Callable[[Key], jax.Array] | None = None,
) -> tuple[Image, Carry]:
    """Steps `first` to `last` - 1 of `sample_with_coefficients`, for callers that watch or stop the reverse loop.

    Args:
        carry: the state before step `first`; None for the state before step 0, and then no step is taken.
        first, last: int32 scalars; they may be traced, so that all parts share one program.

    Returns:
        [B,H,W,C] float32 in [-1,1], y_t as an image (the sample after the last step), and the state.
    """
    start, advance = _reverse_process(
        denoiser, key, cond, shape=shape, step=step, prediction=prediction, space=space, noise=noise
    )

    def body(index: jax.Array, carry: Carry) -> Carry:
        return advance(carry, index, jax.tree.map(lambda table: jnp.asarray(table)[index], coefficients))

    carry = start() if carry is None else jax.lax.fori_loop(first, last, body, carry)
    return jnp.clip(space.decode(carry.y, cond), -1.0, 1.0), carry


def _reverse_process(
    denoiser: Denoiser,
    key: Key,
    cond: Conditioning,
    *,
    shape: tuple[int, ...],
    step: SolverStep,
    prediction: Prediction,
    space: Space,
    noise: Callable[[Key], jax.Array] | None,
) -> tuple[Callable[[], Carry], Callable[[Carry, jax.Array, Any], Carry]]:
    """(start, advance): the state before the first step; (state, index of a step, its coefficients) -> state."""
    batch_size = shape[0]
    if key.shape not in ((), (batch_size,)):
        raise ValueError(f"key must be one key or {batch_size} keys, got shape {key.shape}")

    def denoise(y: jax.Array, gamma: jax.Array) -> Any:
        level = jnp.full((batch_size,), gamma)
        output, *variance = _halves(denoiser(y, level, cond), shape[-1])
        y0_hat = to_y0(output, y, level, prediction)
        # Clipping would turn an infinite output into a valid image; NaN survives it, and callers can check for it.
        y0_hat = jnp.where(jnp.isfinite(y0_hat), y0_hat, jnp.nan)
        # Inside Heun's method gamma is 1 only in the branch that is not taken.
        clipped = space.clip(y0_hat, cond)
        if not step.learned:
            return clipped
        if not variance:
            raise ValueError("the solver needs a denoiser that predicts its variance too, in 2C channels")
        return clipped, (variance[0] + 1.0) / 2.0

    def normal(keys: Key) -> jax.Array:
        if noise is not None:
            return noise(keys)
        if keys.ndim == 0:
            return jax.random.normal(keys, shape)
        return jax.vmap(lambda one: jax.random.normal(one, shape[1:]))(keys)

    first, rest = split(key)  # so that y_T is the same for every solver and number of steps

    def start() -> Carry:
        y = normal(first)
        return Carry(y, step.init(y))

    def advance(carry: Carry, index: jax.Array, coefficient: Any) -> Carry:
        z = normal(_of_step(rest, index)) if step.stochastic else None
        return step.step(denoise, carry, z, coefficient)

    return start, advance


def _halves(output: jax.Array, channels: int) -> list[jax.Array]:
    """The prediction, and the variance where the network has twice the image's channels."""
    return jnp.split(output, 2, axis=-1) if output.shape[-1] == 2 * channels else [output]


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
