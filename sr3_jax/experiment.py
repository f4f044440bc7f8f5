"""The one door for a config: from `get_config()` and overrides to checked, plain values, or one sentence of error."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sr3_jax import model as models
from sr3_jax.aliases import Conditioning, Key, Params, UserError
from sr3_jax.diffusion.loss import min_snr
from sr3_jax.diffusion.process import KINDS
from sr3_jax.nn.unet import UNet
from sr3_jax.train import optim
from sr3_jax.train.step import Objective

DEFAULTS: Mapping[str, Any] = {
    "model": {
        "channels": 128,
        "multipliers": (1, 2, 4, 8, 8),
        "num_blocks": (3, 3, 3, 3, 3),  # one number a level, on the way down
        "attention_levels": (),
        "mid_attention": True,
        "head_channels": 0,  # 0: one head
        "layout": "biggan",  # or efficient
        "patch": 1,  # space-to-depth: 1, 2 or 4
        "norm": "group",  # or pixel
        "film": False,
        "dropout": 0.0,
        "num_classes": 0,
        "augment": False,
        "remat": False,
        "dtype": "float32",  # or bfloat16
    },
    "diffusion": {
        "space": "image",  # or residual
        "residual_scale": 1.0,
        "kind": "eps",  # or v, y0
        "norm": "l1",  # or l2
        "weighting": "none",  # or min_snr
        "schedule": "linear",  # or quadratic, cosine
        "num_steps": 2000,  # T
        "beta_start": 1e-6,
        "beta_end": 1e-2,
    },
    "data": {
        "source": "photos:train",  # or tfds:NAME/CONFIG:SPLIT, folder:PATH
        "eval_source": "photos:test",
        "crop": 128,
        "scale": 4,
        "threads": 4,
        "cache_mb": 1024,  # decoded pictures kept in memory
    },
    "optim": {
        "learning_rate": 1e-4,
        "warmup_steps": 10_000,
        "decay": "constant",  # or cosine
        "clip_norm": 1.0,  # 0: no clipping
        "b1": 0.9,
        "b2": 0.999,
        "ema_decay": 0.9999,
    },
    "train": {
        "num_steps": 1_000_000,
        "minutes": 0.0,  # stop after that long; 0: no limit
        "batch_size": 256,
        "accumulation": 1,
        "seed": 0,
        "log_every": 50,
        "init_from": "",  # a model whose weights to start from
    },
    "eval": {
        "every": 5000,
        "num_images": 8,
        "steps": 25,  # of the sampler; also the model's default
        "solver": "dpmpp_2m",
    },
    "checkpoint": {"every": 5000, "keep": 3},
    "mesh": {"data": -1, "fsdp": 1},
}


CHOICES = (
    ("diffusion", "space", ("image", "residual")),
    ("diffusion", "kind", KINDS),
    ("diffusion", "norm", ("l1", "l2")),
    ("diffusion", "weighting", ("none", "min_snr")),
    ("diffusion", "schedule", ("linear", "quadratic", "cosine")),
    ("optim", "decay", ("constant", "cosine")),
    ("eval", "solver", models.SOLVERS),
    ("model", "layout", ("biggan", "efficient")),
    ("model", "patch", (1, 2, 4)),
    ("model", "norm", ("group", "pixel")),
    ("model", "dtype", ("float32", "bfloat16")),
)
POSITIVE = (
    ("diffusion", "residual_scale"),
    ("diffusion", "beta_start"),
    ("data", "crop"),
    ("data", "scale"),
    ("data", "threads"),
    ("optim", "learning_rate"),
    ("train", "num_steps"),
    ("train", "batch_size"),
    ("train", "accumulation"),
    ("train", "log_every"),
    ("eval", "every"),
    ("eval", "num_images"),
    ("eval", "steps"),
    ("checkpoint", "every"),
    ("checkpoint", "keep"),
)
NOT_NEGATIVE = (
    ("data", "cache_mb"),
    ("optim", "warmup_steps"),
    ("optim", "clip_norm"),
    ("train", "minutes"),
    ("train", "seed"),
)


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
        return init_params(self.objective.network, key)

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


def init_params(network: UNet, key: Key) -> Params:
    """Fresh weights of an SR network, from the smallest input that it takes."""
    image = jnp.zeros((1, network.stride, network.stride, network.out_channels))
    cond: Conditioning = {"upsampled": image}
    if network.num_classes:
        cond = {**cond, "label": jnp.zeros((1,), jnp.int32)}
    return network.init(key, image, jnp.full((1,), 0.5), cond)["params"]


def build_network(section: Mapping[str, Any] | ConfigDict) -> UNet:
    """The network of a config's `model` section; missing fields take their defaults."""
    network = models.build_network(complete({"model": _plain(section)})["model"])
    _check_network(network)
    return network


def count_parameters(config: ConfigDict | Mapping[str, Any]) -> int:
    """The number of weights of a config's network, from shapes alone: no array is made."""
    network = build_network(config["model"])
    shapes = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config file's `get_config()` over the defaults, with `--config.SECTION.FIELD=VALUE` overrides, as plain values.

    Raises:
        UserError: no such file, no get_config in it, an unknown field, a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config={path}: there is no such file; the presets are in configs/")
    spec = importlib.util.spec_from_file_location("sr3_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} is not a Python file; give one that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        given = module.get_config()
    except Exception as error:  # whatever a user's file raises is the user's to mend
        raise UserError(f"--config={path} does not load ({type(error).__name__}: {error})") from error
    config = complete(given)
    for override in overrides:
        name, equals, text = override.removeprefix("--config.").partition("=")
        section, dot, field = name.partition(".")
        if not override.startswith("--config.") or not equals or not dot:
            raise UserError(
                f"{override!r} is not understood; override a field as --config.SECTION.FIELD=VALUE"
            )
        config[section] = config.get(section, {}) | {field: _parse(section, field, text)}
    return config


def complete(given: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the fields of `given` in their place, types checked."""
    values = _plain(given)
    config = {section: dict(fields) for section, fields in DEFAULTS.items()}
    for section, fields in values.items():
        for field, value in fields.items():
            config.get(section, {})[field] = _typed(section, field, value)
    return config


def _plain(given: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return given.to_dict() if isinstance(given, ConfigDict) else dict(given)


def _default(section: str, field: str) -> Any:
    if section not in DEFAULTS:
        raise UserError(f"config has no section {section!r}{_nearest(section, DEFAULTS)}")
    if field not in DEFAULTS[section]:
        raise UserError(f"config.{section} has no field {field!r}{_nearest(field, DEFAULTS[section])}")
    return DEFAULTS[section][field]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _typed(section: str, field: str, value: Any) -> Any:
    """The value, if it has its default's type; ints pass for floats and lists for tuples."""
    default = _default(section, field)
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return tuple(value)
    if type(value) is not kind or kind is tuple:
        wanted = {tuple: "a tuple of whole numbers", int: "a whole number", float: "a number"}
        raise UserError(
            f"config.{section}.{field} must be {wanted.get(kind, {bool: 'true or false', str: 'text'}.get(kind))}, "
            f"got {value!r}; the default is {default!r}"
        )
    return value


def _parse(section: str, field: str, text: str) -> Any:
    if isinstance(_default(section, field), str):
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower(), None)
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = text
    return _typed(section, field, value)


def read(given: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Check a config as a whole and build what it names.

    Raises:
        UserError: the first field that cannot work, with its value and the way out.
    """
    config = complete(given)
    model, diffusion, data = config["model"], config["diffusion"], config["data"]
    network = build_network(model)
    for section, field, choices in CHOICES:
        if config[section][field] not in choices:
            _refuse(section, field, config[section][field], f"be one of {', '.join(map(str, choices))}")
    for section, field in POSITIVE:
        if not config[section][field] > 0:
            _refuse(section, field, config[section][field], "be above 0")
    for section, field in NOT_NEGATIVE:
        if config[section][field] < 0:
            _refuse(section, field, config[section][field], "be 0 or more")
    if not 0 <= config["optim"]["ema_decay"] < 1:
        _refuse("optim", "ema_decay", config["optim"]["ema_decay"], "be at least 0 and under 1")
    multiple = math.lcm(network.stride, data["scale"])
    if data["crop"] % multiple:
        _refuse(
            "data",
            "crop",
            data["crop"],
            f"be a multiple of {multiple}, for the network's stride and the scale",
        )
    if diffusion["num_steps"] < 2:
        _refuse("diffusion", "num_steps", diffusion["num_steps"], "be at least 2")
    objective = Objective(
        network=network,
        schedule=models.build_schedule(diffusion),
        space=models.build_space(diffusion),
        kind=diffusion["kind"],
        norm=diffusion["norm"],
        weighting=min_snr() if diffusion["weighting"] == "min_snr" else None,
        scale=data["scale"],
    )
    return Experiment(config, objective)


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


def _refuse(section: str, field: str, value: Any, rule: str) -> None:
    raise UserError(f"config.{section}.{field} must {rule}, got {value!r}")


def _check_network(network: UNet) -> None:
    levels = len(network.multipliers)
    if levels == 0 or min(network.multipliers) < 1:
        _refuse("model", "multipliers", network.multipliers, "hold one whole number above 0 for each level")
    if len(network.num_blocks) != levels or min(network.num_blocks) < 1:
        _refuse(
            "model",
            "num_blocks",
            network.num_blocks,
            f"hold {levels} numbers above 0, one for each multiplier",
        )
    if any(not 0 <= level < levels for level in network.attention_levels):
        _refuse("model", "attention_levels", network.attention_levels, f"hold levels from 0 to {levels - 1}")
    if network.channels < 4 or network.channels % 4:
        _refuse("model", "channels", network.channels, "be a multiple of 4")
    if not 0 <= network.dropout < 1:
        _refuse("model", "dropout", network.dropout, "be at least 0 and under 1")
    if network.num_classes < 0:
        _refuse("model", "num_classes", network.num_classes, "be 0 or the number of labels")
    attended = {network.multipliers[level] for level in network.attention_levels}
    attended |= {network.multipliers[-1]} if network.mid_attention else set()
    heads = network.head_channels
    if heads < 0 or (heads and any(network.channels * multiplier % heads for multiplier in attended)):
        _refuse(
            "model", "head_channels", heads, "be 0 (one head) or divide the channels of each attention level"
        )
