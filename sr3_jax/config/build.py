"""Builds the components of a model from a complete config; checks that involve several fields or the network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sr3_jax.config.fields import REGRESSION, SECTIONS
from sr3_jax.config.schema import check_ranges, invalid
from sr3_jax.degradations import ConditioningAugmentation, Degradation, DegradationRound
from sr3_jax.diffusion import schedule as schedules
from sr3_jax.diffusion import space as spaces
from sr3_jax.diffusion.schedule import NoiseSchedule
from sr3_jax.diffusion.solvers import make_solver
from sr3_jax.diffusion.space import Space
from sr3_jax.errors import UserError
from sr3_jax.nn.adm_unet import AdmUNet
from sr3_jax.nn.sr3_port_unet import Sr3PortUNet
from sr3_jax.nn.unet import Network, UNet
from sr3_jax.types import Conditioning, Key, Params

LARGEST_WIDTH = 16_384  # channels of a level
NETWORKS: Mapping[str, type[Network]] = {"unet": UNet, "adm": AdmUNet, "sr3_port": Sr3PortUNet}

Config = Mapping[str, Mapping[str, Any]]  # complete: every section and field of `fields.SECTIONS`


@dataclass(frozen=True)
class Stage:
    """A model's place in a cascade.

    Attributes:
        name: `config.stage.name`; '' if it has none.
        size: side of the output images, in pixels; 0 for any size.
        scale: super-resolution factor; None for a base model, which generates images from noise.
    """

    name: str
    size: int
    scale: int | None


def build_network(section: Mapping[str, Any]) -> Network:
    """The network of a `model` section.

    Raises:
        UserError: the fields do not fit each other, or the network does not have one of them.
    """
    kind = section["network"]
    known = {field.name for field in dataclasses.fields(NETWORKS[kind])}
    for name, field in SECTIONS["model"].fields.items():
        if name not in known | {"network"} and section[name] != field.default:
            invalid("model", name, section[name], f"be {field.default!r} if config.model.network is {kind}")
    network = NETWORKS[kind](**{name: value for name, value in section.items() if name in known})
    _check_network(network)
    return network


def build_schedule(section: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule of a `diffusion` section.

    Raises:
        UserError: the betas are so large that no signal is left in float64.
    """
    steps, name = section["num_steps"], section["schedule"]
    ends = {"beta_start": section["beta_start"], "beta_end": section["beta_end"]}
    try:
        if name == "cosine":
            return schedules.cosine(steps)
        return (schedules.linear if name == "linear" else schedules.quadratic)(steps, **ends)
    except ValueError as error:
        raise UserError(
            f"config.diffusion gives no valid noise schedule ({error}); lower config.diffusion.beta_end, got "
            f"{section['beta_end']!r}"
        ) from None


def build_space(section: Mapping[str, Any]) -> Space:
    """The space of a `diffusion` section."""
    return spaces.image() if section["space"] == "image" else spaces.residual(section["residual_scale"])


def build_degradation(config: Config) -> Degradation:
    """The degradation of the low-res images in training."""
    return Degradation(
        DegradationRound(**config["degradation"]), DegradationRound(**config["second_degradation"])
    )


def build_augmentation(section: Mapping[str, Any]) -> ConditioningAugmentation | None:
    """The augmentation of the low-res image in a `data` section; None for no augmentation."""
    if section["augment"] == "none":
        return None
    return ConditioningAugmentation(section["augment"], section["augment_largest"], section["augment_share"])


def profile_window(section: Mapping[str, Any]) -> range:
    """The steps of `profile_steps` in a `train` section: FIRST:LAST, as a Python slice; empty for ''.

    Raises:
        UserError: it is something else.
    """
    text = section["profile_steps"]
    first, _, last = text.partition(":")
    if text and not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        invalid("train", "profile_steps", text, "be FIRST:LAST with FIRST < LAST, such as 100:110, or empty")
    return range(int(first), int(last)) if text else range(0)


def init_params(network: Network, key: Key) -> Params:
    """New parameters of a network, from the smallest input that it accepts."""
    image = jnp.zeros((1, network.stride, network.stride, network.out_channels))
    cond: Conditioning = {"upsampled": image} if network.low_res else {}
    if network.num_classes:
        cond = {**cond, "label": jnp.zeros((1,), jnp.int32)}
    return network.init(key, image, jnp.full((1,), 0.5), cond)["params"]


def count_parameters(config: Config) -> int:
    """The number of parameters of a config's network, from shapes; no array is allocated."""
    network = build_network(config["model"])
    shapes = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def check_params(network: Network, params: Params, name: str) -> None:
    """Check that parameters have the structure and shapes of a network.

    Args:
        name: of the model, for the error.

    Raises:
        UserError: they do not.
    """
    wanted = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (wanted, params))
    ]
    if shapes[0] != shapes[1]:
        wrong = min(path for path, _ in shapes[0].items() ^ shapes[1].items())
        raise UserError(
            f"the parameters of model {name} do not match the network in its config (they differ at {wrong}); "
            "export or train it again"
        )


_LEAST_LPIPS_CROP = 34  # pixels; features.lpips.LEAST_SIDE, and up to 3 pixels that its loss cuts off


def check_config(config: Config) -> None:
    """Check a complete config as a whole: each field's range, and that the fields fit each other.

    Raises:
        UserError: the first field that cannot work, with its value and the rule.
    """
    check_ranges(config)
    data = config["data"]
    network = build_network(config["model"])
    multiple = data["shrink"] * math.lcm(network.stride, data["scale"])
    if data["crop"] % multiple:
        rule = f"be a multiple of {multiple} (for config.data.shrink, config.data.scale and the network's levels)"
        invalid("data", "crop", data["crop"], rule)
    profile_window(config["train"])
    _check_stage(config)
    _check_pairs(config)
    prediction = config["diffusion"]["prediction"]
    if config["model"]["output_skip"] and prediction != "y0":
        invalid("diffusion", "prediction", prediction, "be y0 if config.model.output_skip is above 0")
    if config["model"]["learned_variance"]:
        invalid("model", "learned_variance", True, "be false for training (convert with --variance drop)")
    try:
        solver = make_solver(config["sampling"]["solver"])
    except ValueError as error:
        raise UserError(f"config.sampling.solver cannot be used: {error}") from None
    if solver.compiled.learned:
        rule = "be another solver if config.model.learned_variance is false"
        invalid("sampling", "solver", config["sampling"]["solver"], rule)
    if config["model"]["regression"]:
        for (section, name), value in REGRESSION.items():
            if config[section][name] != value:
                invalid(
                    section, name, config[section][name], f"be {value} if config.model.regression is true"
                )


def _check_stage(config: Config) -> None:
    """Fields that a base model cannot have, that augmentation and label dropout need, and the size of a stage."""
    model, data, size = config["model"], config["data"], config["stage"]["size"]
    if not model["low_res"]:
        for section, name, value in (
            ("data", "scale", 1),
            ("diffusion", "space", "image"),
            ("model", "regression", False),
            ("model", "augment", False),
            ("data", "augment", "none"),
            ("data", "degradation", "clean"),
            ("sampling", "back_projection", 0),
            ("checkpoint", "best", False),
        ):
            if config[section][name] != value:
                invalid(section, name, config[section][name], f"be {value} if config.model.low_res is false")
        if size not in (0, data["crop"] // data["shrink"]):
            invalid("stage", "size", size, "be crop / shrink, or 0, if config.model.low_res is false")
    if model["low_res"] and data["framing"] == "square" and size not in (0, data["crop"] // data["shrink"]):
        invalid("stage", "size", size, "be crop / shrink, or 0, if config.data.framing is square")
    if size % data["scale"]:
        invalid("stage", "size", size, f"be a multiple of config.data.scale={data['scale']}")
    if data["augment"] == "noise" and data["augment_largest"] > 1:
        invalid(
            "data", "augment_largest", data["augment_largest"], "be at most 1 if config.data.augment is noise"
        )
    if build_degradation(config).second.is_clean and config["degradation"]["resize"] != (1.0, 1.0):
        rule = "be (1.0, 1.0) if config.second_degradation does nothing"
        invalid("degradation", "resize", config["degradation"]["resize"], rule)
    if model["augment"] and data["augment"] == "none":
        invalid("model", "augment", True, "be false if config.data.augment is none")
    lpips = config["diffusion"]["lpips"]
    if lpips and config["diffusion"]["prediction"] == "eps":  # its estimate of y0 is far off at low gamma
        invalid("diffusion", "lpips", lpips, "be 0 if config.diffusion.prediction is eps")
    if lpips and data["crop"] // data["shrink"] < _LEAST_LPIPS_CROP:
        invalid("diffusion", "lpips", lpips, f"be 0 for crops under {_LEAST_LPIPS_CROP} pixels")
    if data["label_dropout"] and not model["num_classes"]:
        invalid("data", "label_dropout", data["label_dropout"], "be 0 if config.model.num_classes is 0")
    if data["label_dropout"] and model["network"] == "adm":
        invalid("data", "label_dropout", data["label_dropout"], "be 0 if config.model.network is adm")


def _check_pairs(config: Config) -> None:
    """Fields that make low-res images or resample the others, where a source has low-res images."""
    data, sources = config["data"], [config["data"][name] for name in ("source", "eval_source")]
    if not any(source.startswith("pairs:") for source in sources):
        return
    for section, name, value in (
        ("model", "low_res", True),
        ("data", "framing", "crop"),
        ("data", "shrink", 1),
    ):
        if config[section][name] != value:
            invalid(
                section, name, config[section][name], f"be {value} if a data source is pairs:LR_DIR:HR_DIR"
            )
    clean = data["degradation"] == "clean" and build_degradation(config).is_clean
    if sources[0].startswith("pairs:") and not clean:
        rule = "be clean, without fields of config.degradation, if config.data.source is pairs:LR_DIR:HR_DIR"
        invalid("data", "degradation", data["degradation"], rule)


def _check_network(network: Network) -> None:
    levels = len(network.multipliers)
    if levels == 0 or min(network.multipliers) < 1:
        invalid(
            "model", "multipliers", network.multipliers, "hold one whole number of 1 or more for each level"
        )
    if network.channels * max(network.multipliers) > LARGEST_WIDTH:
        rule = (
            f"give levels of at most {LARGEST_WIDTH} channels with config.model.channels={network.channels}"
        )
        invalid("model", "multipliers", network.multipliers, rule)
    if len(network.num_blocks) != levels or min(network.num_blocks) < 1:
        rule = f"hold {levels} whole numbers of 1 or more, one for each of config.model.multipliers"
        invalid("model", "num_blocks", network.num_blocks, rule)
    if any(not 0 <= level < levels for level in network.attention_levels):
        invalid("model", "attention_levels", network.attention_levels, f"hold levels from 0 to {levels - 1}")
    if network.channels < 4 or network.channels % 4:
        invalid("model", "channels", network.channels, "be a multiple of 4")
    attended = {network.multipliers[level] for level in network.attention_levels}
    attended |= {network.multipliers[-1]} if network.mid_attention else set()
    heads = network.head_channels
    if heads and any(network.channels * multiplier % heads for multiplier in attended):
        rule = "be 0 (one head) or divide the channels of each level with attention"
        invalid("model", "head_channels", heads, rule)
    if isinstance(network, UNet):
        return
    if any(network.channels * multiplier % network.norm_groups for multiplier in (1, *network.multipliers)):
        rule = "divide config.model.channels and the channels of each level"
        invalid("model", "norm_groups", network.norm_groups, rule)
    count = network.heads if isinstance(network, AdmUNet) and not heads else 1
    if any(network.channels * multiplier % count for multiplier in attended):
        invalid("model", "heads", count, "divide the channels of each level with attention")
