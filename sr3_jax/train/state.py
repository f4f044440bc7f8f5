"""The training state: creation, sharding, and the exponential moving average (EMA) of the weights."""

from __future__ import annotations

import re
from collections import Counter
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
    """Everything in a checkpoint. It has no random state: step k derives its keys from the seed and k.

    Attributes:
        step: int32 scalar, the number of updates so far.
        params: float32 weights.
        ema_params: float32 moving average of the weights, used for sampling.
        opt_state: state of the optimizer.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: Any


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the moving average starts at the weights."""
    # A copy, since `params` and `ema_params` are both donated and a buffer can be donated only once.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params))


def abstract_state(
    init_params: Callable[[Key], Params], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating arrays."""
    shapes = jax.eval_shape(lambda key: init_state(init_params(key), optimizer), jax.random.key(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def create_state(
    init_params: Callable[[Key], Params], optimizer: optax.GradientTransformation, key: Key, mesh: Mesh
) -> TrainState:
    """Initialize the state with its arrays already sharded, so that no device ever holds a whole sharded array."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init_params, optimizer, mesh))
    return jax.jit(lambda key: init_state(init_params(key), optimizer), out_shardings=shardings)(key)


def start_from(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first update, from given weights (on the host or on any device)."""
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    # Passed as an argument, since a closed-over array would become a constant in the compiled program.
    placed = jax.device_put(jax.device_get(params), shardings.params)
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(placed)


def skipped_steps(state: TrainState) -> int:
    """The number of steps so far that were skipped: those that the optimizer has not counted."""
    counts = [count for _, count in optax.tree.get_all_with_path(state.opt_state, "count")]
    return int(state.step) - int(counts[0]) if counts else 0


def update_ema(ema_params: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """Update the moving average with min(decay, (1 + step) / (10 + step)).

    Without this warm-up, the average of the first 1 / (1 - decay) steps would consist mostly of the random initial
    weights. The paper does not mention a moving average; Palette, by the same group, uses 0.9999.
    """
    warm_decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda ema, new: ema + (1.0 - warm_decay) * (new - ema), ema_params, params)


def parameter_table(params: Params) -> str:
    """The number of parameters of each part of a network, as lines of text; a level of the U-Net is one part."""
    counts: Counter[str] = Counter()
    for name, part in params.items():
        found = re.match(r"(?:down|up)_\d+|[a-z]+", name)
        counts[found[0] if found else name] += sum(leaf.size for leaf in jax.tree.leaves(part))
    total = max(1, counts.total())
    rows = [f"  {name:<12} {count:>13,} {count / total:6.1%}" for name, count in counts.items()]
    return "\n".join(["Parameters:", *rows])
