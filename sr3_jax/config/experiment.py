"""The one door for a config: from `get_config()` and overrides to checked, plain values, or one sentence of error."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sr3_jax.config import build
from sr3_jax.config.schema import DEFAULTS, check_ranges, check_section, parse, refuse, typed
from sr3_jax.diffusion.loss import min_snr
from sr3_jax.errors import UserError
from sr3_jax.nn.unet import UNet
from sr3_jax.train import optim
from sr3_jax.train.examples import Task
from sr3_jax.train.step import Objective
from sr3_jax.types import Key, Params


@dataclass(frozen=True, eq=False)
class Experiment:
    """A checked config: what training needs, ready made where it can be, as plain values elsewhere.

    Attributes:
        config: the whole config as nested plain dicts, which is what a workdir and an export carry.
    """

    config: Mapping[str, Any]
    objective: Objective

    def section(self, name: str) -> Mapping[str, Any]:
        """The plain values of one section."""
        return self.config[name]

    def init_params(self, key: Key) -> Params:
        """Fresh weights."""
        return build.init_params(self.objective.network, key)

    def optimizer(self) -> Any:
        """The optimiser with its schedule."""
        section = self.config["optim"]
        return optim.adam(
            self.lr_schedule(), b1=section["b1"], b2=section["b2"], clip_norm=section["clip_norm"]
        )

    def lr_schedule(self) -> Any:
        """step -> learning rate."""
        section = self.config["optim"]
        return optim.lr_schedule(
            section["learning_rate"],
            warmup_steps=section["warmup_steps"],
            decay=section["decay"],
            num_steps=self.config["train"]["num_steps"],
        )


def build_network(section: Mapping[str, Any] | ConfigDict) -> UNet:
    """The network of a config's `model` section; missing fields take their defaults."""
    network = build.build_network(complete({"model": _plain(section)})["model"])
    _check_network(network)
    return network


def count_parameters(config: ConfigDict | Mapping[str, Any]) -> int:
    """The number of weights of a config's network, from shapes alone: no array is made."""
    network = build_network(config["model"])
    shapes = jax.eval_shape(lambda key: build.init_params(network, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config file's `get_config()` over the defaults, with `--config.SECTION.FIELD=VALUE` overrides, as plain values.

    Raises:
        UserError: no such file, no get_config in it, an unknown field, a value of the wrong type.
    """
    given = _get_config(Path(path))
    if "stages" in given:
        raise UserError(f"--config={path} is a cascade of {', '.join(given['stages'])}: name one of these")
    config = complete(given)
    for override in overrides:
        name, equals, text = override.removeprefix("--config.").partition("=")
        section, dot, field = name.partition(".")
        if not override.startswith("--config.") or not equals or not dot:
            raise UserError(
                f"{override!r} is not understood; override a field as --config.SECTION.FIELD=VALUE"
            )
        config[section] = config.get(section, {}) | {field: parse(section, field, text)}
    return config


def load_cascade(path: str | Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The configs of the stages that a cascade's config names in `stages`, with the overrides in each; [] for others.

    Raises:
        UserError: as `load_config`; two stages of one name, or one without.
    """
    path = Path(path)
    stages = _get_config(path).get("stages", ())
    configs = [load_config(path.parent / stage, overrides) for stage in stages]
    names = [config["stage"]["name"] for config in configs]
    for name, stage in zip(names, stages, strict=True):
        if names.count(name) > 1 or name in ("", "..") or Path(name).name != name:
            raise UserError(f"config.stage.name of {stage} must be a folder's name of its own, got {name!r}")
    return configs


def _get_config(path: Path) -> dict[str, Any]:
    """What `get_config()` of a file returns, as plain values. UserError if there is none."""
    if not path.is_file():
        raise UserError(f"--config={path}: there is no such file; the presets are in configs/")
    spec = importlib.util.spec_from_file_location("sr3_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is not a Python file; give one that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    beside = str(path.parent.absolute())  # so that a config can import its twin
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
        return _plain(module.get_config())
    except Exception as error:  # whatever a user's file raises is the user's to mend
        raise UserError(f"--config={path} does not load ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(beside)


def complete(given: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the fields of `given` in their place, types checked."""
    values = _plain(given)
    config = {section: dict(fields) for section, fields in DEFAULTS.items()}
    for section, fields in values.items():
        check_section(section, fields)
        for field, value in fields.items():
            config[section][field] = typed(section, field, value)
    return config


def _plain(given: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: part.to_dict() if isinstance(part, ConfigDict) else part for name, part in dict(given).items()
    }


def read(given: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Check a config as a whole and build what it names.

    Raises:
        UserError: the first field that cannot work, with its value and the way out.
    """
    config = complete(given)
    model, diffusion, data = config["model"], config["diffusion"], config["data"]
    network = build_network(model)
    check_ranges(config)
    multiple = data["shrink"] * math.lcm(network.stride, data["scale"])
    if data["crop"] % multiple:
        refuse(
            "data",
            "crop",
            data["crop"],
            f"be a multiple of {multiple}, for shrink, the network's stride and the scale",
        )
    _check_stage(config)
    if model["regression"]:
        _check_regression(config)
    if diffusion["num_steps"] < 2:
        refuse("diffusion", "num_steps", diffusion["num_steps"], "be at least 2")
    try:
        schedule = build.build_schedule(diffusion)
    except ValueError as error:  # betas so large that no signal is left in float64
        raise UserError(f"config.diffusion makes no noise schedule ({error}); lower beta_end") from None
    objective = Objective(
        network=network,
        schedule=schedule,
        space=build.build_space(diffusion),
        prediction=diffusion["prediction"],
        norm=diffusion["norm"],
        weighting=min_snr() if diffusion["weighting"] == "min_snr" else None,
        task=_task(config),
    )
    return Experiment(config, objective)


def _task(config: Mapping[str, Any]) -> Task:
    model, data = config["model"], config["data"]
    return Task(
        scale=data["scale"] if model["low_res"] else None,
        shrink=data["shrink"],
        augmentation=build.build_augmentation(data),
        num_classes=model["num_classes"],
        label_dropout=data["label_dropout"],
    )


def _check_stage(config: Mapping[str, Any]) -> None:
    """What a base stage cannot have, what augmentation and dropped labels need, and the size that a stage makes."""
    model, data, size = config["model"], config["data"], config["stage"]["size"]
    if not model["low_res"]:
        for section, field, value in (
            ("data", "scale", 1),
            ("diffusion", "space", "image"),
            ("model", "regression", False),
            ("model", "augment", False),
            ("data", "augment", "none"),
            ("checkpoint", "best", False),
        ):
            if config[section][field] != value:
                rule = f"be {value} where config.model.low_res is false"
                refuse(section, field, config[section][field], rule)
        if size not in (0, data["crop"] // data["shrink"]):
            refuse("stage", "size", size, "be crop / shrink where config.model.low_res is false, or 0")
    whole = data["framing"] == "square"
    if model["low_res"] and whole and size not in (0, data["crop"] // data["shrink"]):
        refuse("stage", "size", size, "be crop / shrink where config.data.framing is square, or 0")
    if size % data["scale"]:
        refuse("stage", "size", size, f"be a multiple of config.data.scale={data['scale']}")
    if data["augment"] == "noise" and data["augment_largest"] > 1:
        refuse("data", "augment_largest", data["augment_largest"], "be 1 at most where augment is noise")
    if model["augment"] and data["augment"] == "none":
        refuse(
            "model",
            "augment",
            True,
            "be false where config.data.augment is none: there is no strength to tell",
        )
    if data["label_dropout"] and not model["num_classes"]:
        refuse("data", "label_dropout", data["label_dropout"], "be 0 where config.model.num_classes is 0")


def _check_regression(config: Mapping[str, Any]) -> None:
    """A regression is what is left of the diffusion where the network sees no noise: y0 by the squared error, once."""
    for section, field, value in (
        ("diffusion", "prediction", "y0"),
        ("diffusion", "norm", "l2"),
        ("diffusion", "weighting", "none"),
        ("sampling", "steps", 1),
        ("sampling", "solver", "ddim"),
    ):
        if config[section][field] != value:
            refuse(
                section, field, config[section][field], f"be {value} where config.model.regression is true"
            )


def check_batch(config: Mapping[str, Any], *, devices: int, processes: int) -> None:
    """That the batch divides over devices, processes and accumulation.

    Raises:
        UserError: it does not; the sentence gives the nearest batch that does.
    """
    train = config["train"]
    multiple = math.lcm(devices * train["accumulation"], processes)
    if train["batch_size"] % multiple:
        nearest = max(1, round(train["batch_size"] / multiple)) * multiple
        raise UserError(
            f"config.train.batch_size={train['batch_size']} does not divide over {devices} devices with "
            f"config.train.accumulation={train['accumulation']}: give a multiple of {multiple}, such as {nearest}"
        )


def _check_network(network: UNet) -> None:
    levels = len(network.multipliers)
    if levels == 0 or min(network.multipliers) < 1:
        refuse("model", "multipliers", network.multipliers, "hold one whole number above 0 for each level")
    if len(network.num_blocks) != levels or min(network.num_blocks) < 1:
        refuse(
            "model",
            "num_blocks",
            network.num_blocks,
            f"hold {levels} numbers above 0, one for each multiplier",
        )
    if any(not 0 <= level < levels for level in network.attention_levels):
        refuse("model", "attention_levels", network.attention_levels, f"hold levels from 0 to {levels - 1}")
    if network.channels < 4 or network.channels % 4:
        refuse("model", "channels", network.channels, "be a multiple of 4")
    if not 0 <= network.dropout < 1:
        refuse("model", "dropout", network.dropout, "be at least 0 and under 1")
    if network.num_classes < 0:
        refuse("model", "num_classes", network.num_classes, "be 0 or the number of labels")
    attended = {network.multipliers[level] for level in network.attention_levels}
    attended |= {network.multipliers[-1]} if network.mid_attention else set()
    heads = network.head_channels
    if heads < 0 or (heads and any(network.channels * multiplier % heads for multiplier in attended)):
        refuse(
            "model", "head_channels", heads, "be 0 (one head) or divide the channels of each attention level"
        )
