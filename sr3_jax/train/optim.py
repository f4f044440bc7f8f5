"""Learning-rate schedule and optimizers."""

from __future__ import annotations

from typing import Literal

import jax
import optax

from sr3_jax.types import Params

Decay = Literal["constant", "cosine"]


def lr_schedule(
    learning_rate: float, *, warmup_steps: int, decay: Decay = "constant", num_steps: int = 0
) -> optax.Schedule:
    """Linear warm-up, then constant (paper section 4) or a cosine decay to 0 at `num_steps`.

    Raises:
        ValueError: `decay` is unknown.
    """
    if decay not in ("constant", "cosine"):
        raise ValueError(f"decay must be 'constant' or 'cosine', got {decay!r}")
    after = optax.constant_schedule(learning_rate)
    if decay == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, max(1, num_steps - warmup_steps))
    if warmup_steps == 0:
        return after
    # Starts at 1/warmup_steps of the rate rather than at 0, where the first update would do nothing.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    return optax.join_schedules([warmup, after], [warmup_steps])


def adam(schedule: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Adam, as in the paper."""
    return optax.adam(schedule, b1=b1, b2=b2)


def muon(schedule: optax.Schedule, *, b1: float = 0.95, b2: float = 0.999) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): the momentum of each matrix is orthogonalized; Adam for all other parameters.

    A convolution is the matrix from its inputs (kernel positions and channels) to its output channels. The first and
    the last convolution, biases and scales are left to Adam. Updates have the size of Adam's (Liu et al. 2025, section
    2.2), so learning rates compare; Muon takes rates several times as large.

    Args:
        b1: decay of the momentum.
        b2: Adam's beta_2, for the parameters that are left to it.
    """
    from optax.contrib import MuonDimensionNumbers  # `optax.contrib` takes a while to import
    from optax.contrib import muon as make_muon

    def matrices(params: Params) -> Params:
        def dimensions(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
            if path[0].key in ("input", "output") or path[-1].key != "kernel" or leaf.ndim not in (2, 4):
                return None
            return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(dimensions, params)

    return make_muon(
        schedule,
        beta=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


OPTIMIZERS = {"adam": adam, "muon": muon}


def make_optimizer(
    name: str, schedule: optax.Schedule, *, b1: float, b2: float, clip_norm: float = 0.0
) -> optax.GradientTransformation:
    """An optimizer by name, with the global norm of the gradient clipped to `clip_norm` (0 for no clipping)."""
    optimizer = OPTIMIZERS[name](schedule, b1=b1, b2=b2)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer
