"""The parts of a model, each from its section of a config as plain values, checked elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sr3_jax.degradations import ConditioningAugmentation
from sr3_jax.diffusion import schedule as schedules
from sr3_jax.diffusion import space as spaces
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.space import Space
from sr3_jax.errors import UserError
from sr3_jax.nn.unet import UNet
from sr3_jax.types import Conditioning, Key, Params


@dataclass(frozen=True)
class Stage:
    """A model's part in a cascade.

    Attributes:
        name: as its config has it; '' where it has none.
        size: the side of the images that it makes, in pixels; 0: of any.
        scale: of its super-resolution; None: a base stage, which makes images of noise.
    """

    name: str
    size: int
    scale: int | None


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


def build_augmentation(section: Mapping[str, Any]) -> ConditioningAugmentation | None:
    """The augmentation of the condition of a config's `data` section; None where there is none."""
    if section.get("augment", "none") == "none":
        return None
    return ConditioningAugmentation(section["augment"], section["augment_largest"], section["augment_share"])


def init_params(network: UNet, key: Key) -> Params:
    """Fresh weights of a network, from the smallest input that it takes."""
    image = jnp.zeros((1, network.stride, network.stride, network.out_channels))
    cond: Conditioning = {"upsampled": image} if network.low_res else {}
    if network.num_classes:
        cond = {**cond, "label": jnp.zeros((1,), jnp.int32)}
    return network.init(key, image, jnp.full((1,), 0.5), cond)["params"]


def check_params(network: UNet, params: Params, name: str) -> None:
    """That weights are of a network; UserError if they are not."""
    wanted = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (wanted, params))
    ]
    if shapes[0] != shapes[1]:
        wrong = min(path for path, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the weights of model {name} are not those of the network in its config (they differ at {wrong}); "
            "export or train it again"
        )
