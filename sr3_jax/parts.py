"""The parts of a model, each from its section of a config as plain values, checked elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sr3_jax.aliases import UserError
from sr3_jax.diffusion import schedule as schedules
from sr3_jax.diffusion import space as spaces
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.nn.unet import UNet


def build_network(section: Mapping[str, Any]) -> UNet:
    """A UNet from its fields as plain values; lists are taken for tuples, as JSON has none."""
    return UNet(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    )


def build_schedule(section: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule of a config's `diffusion` section."""
    steps, name = section["num_steps"], section["schedule"]
    if name == "cosine":
        return schedules.cosine(steps)
    ends = {"beta_start": section["beta_start"], "beta_end": section["beta_end"]}
    if name in ("linear", "quadratic"):
        return getattr(schedules, name)(steps, **ends)
    raise UserError(f"config.diffusion.schedule must be linear, quadratic or cosine, got {name!r}")


def build_space(section: Mapping[str, Any]) -> Space:
    """The space of a config's `diffusion` section."""
    if section["space"] == "image":
        return spaces.image()
    if section["space"] == "residual":
        return spaces.residual(section["residual_scale"])
    raise UserError(f"config.diffusion.space must be image or residual, got {section['space']!r}")
