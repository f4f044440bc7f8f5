"""Learning-rate schedule and optimizer."""

from __future__ import annotations

from typing import Literal

import optax

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


def adam(
    schedule: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, clip_norm: float = 0.0
) -> optax.GradientTransformation:
    """Adam as in the paper, with the global norm of the gradient clipped to `clip_norm` (0 for no clipping)."""
    optimizer = optax.adam(schedule, b1=b1, b2=b2)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer
