"""What training carries from step to step, where it is kept, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sr3_jax.distributed.sharding import state_shardings
from sr3_jax.types import Key, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds; nothing random is among it.

    Attributes:
        step: int32 scalar, the number of updates made.
        params: float32 weights.
        ema_params: their moving average, which is what sampling uses.
        opt_state: the optimiser's.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: Any


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the moving average starts at the weights."""
    # Its own copy: `params` and `ema_params` are both donated, and a buffer can be donated once.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def abstract_state(
    init_params: Callable[[Key], Params], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making an array."""
    shapes = jax.eval_shape(lambda key: init_state(init_params(key), optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def create_state(
    init_params: Callable[[Key], Params], optimizer: optax.GradientTransformation, key: Key, mesh: Mesh
) -> TrainState:
    """A fresh state, each array made where it will stay: no device ever holds the whole of a sharded one."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init_params, optimizer, mesh))
    return jax.jit(lambda key: init_state(init_params(key), optimizer), out_shardings=shardings)(key)


def start_from(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update of given weights (of the host, or of any device)."""
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    # As an argument: a closed-over array would be a constant in the compiled program.
    placed = jax.device_put(jax.device_get(params), shardings.params)
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(placed)


def update_ema(ema_params: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """One step of the moving average, with warm-up: the decay of update `step` is at most (1+step)/(10+step).

    Without the warm-up the first 1/(1-decay) steps would average mostly the random initial weights. The paper does
    not mention a moving average; Palette, by the same group, uses 0.9999.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda ema, new: ema + (1.0 - decay) * (new - ema), ema_params, params)
