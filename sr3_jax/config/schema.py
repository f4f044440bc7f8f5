"""The fields of a config: their defaults, types and ranges, and how a value given as text is read."""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from sr3_jax.errors import UserError

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
        "remat": False,  # recompute activations in the backward pass
        "remat_keeps": "nothing",  # or convs: all but what convolutions gave
        "low_res": True,  # False: a generator without a low-res image, the base of a cascade
        "regression": False,  # the paper's baseline: one pass from the low-res image, no diffusion
        "dtype": "float32",  # or bfloat16
    },
    "diffusion": {
        "space": "image",  # or residual
        "residual_scale": 1.0,
        "prediction": "eps",  # or v, y0
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
        "framing": "crop",  # random crops; or square: the whole centre square, shrunk to the crop
        "crop": 128,
        "mirror": True,  # half of the crops, in training
        "shrink": 1,  # crops are shrunk by it before anything else: stages of a cascade share one data set
        "scale": 4,  # 1 where config.model.low_res is false
        "label_dropout": 0.0,  # share of examples without their label, for guidance
        "augment": "none",  # or blur, noise: of the low-res image in training
        "augment_largest": 1.0,  # the blur's standard deviation in low-res pixels, or the noise's in [-1,1]
        "augment_share": 0.5,  # of the examples
        "threads": 4,
        "cache_mb": 1024,  # decoded images kept in memory
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
    },
    "sampling": {  # how the model samples by default, held-out evaluation included
        "solver": "dpmpp_2m",
        "steps": 25,
    },
    "checkpoint": {
        "every": 5000,
        "keep": 3,
        "best": False,  # keep the weights of the highest held-out PSNR as best.safetensors
        "allow_older": False,  # go on from an older one where the newest is damaged
    },
    "mesh": {"data": -1, "fsdp": 1},
    "stage": {  # of a cascade
        "name": "",
        "size": 0,  # the side of the images it makes, in pixels; 0: of any
    },
}


CHOICES = (
    ("diffusion", "space", ("image", "residual")),
    ("diffusion", "prediction", ("eps", "v", "y0")),
    ("diffusion", "norm", ("l1", "l2")),
    ("diffusion", "weighting", ("none", "min_snr")),
    ("diffusion", "schedule", ("linear", "quadratic", "cosine")),
    ("data", "framing", ("crop", "square")),
    ("data", "augment", ("none", "blur", "noise")),
    ("optim", "decay", ("constant", "cosine")),
    ("sampling", "solver", ("ancestral", "ddim", "dpmpp_2m", "heun")),
    ("model", "layout", ("biggan", "efficient")),
    ("model", "patch", (1, 2, 4)),
    ("model", "norm", ("group", "pixel")),
    ("model", "dtype", ("float32", "bfloat16")),
    ("model", "remat_keeps", ("nothing", "convs")),
)
POSITIVE = (
    ("diffusion", "residual_scale"),
    ("data", "crop"),
    ("data", "shrink"),
    ("data", "scale"),
    ("data", "augment_largest"),
    ("data", "threads"),
    ("optim", "learning_rate"),
    ("train", "num_steps"),
    ("train", "batch_size"),
    ("train", "accumulation"),
    ("train", "log_every"),
    ("eval", "every"),
    ("eval", "num_images"),
    ("sampling", "steps"),
    ("checkpoint", "every"),
    ("checkpoint", "keep"),
)
NOT_NEGATIVE = (
    ("data", "cache_mb"),
    ("optim", "warmup_steps"),
    ("optim", "clip_norm"),
    ("train", "minutes"),
    ("stage", "size"),
)
BELOW_ONE = (("optim", "b1"), ("optim", "b2"), ("optim", "ema_decay"), ("data", "label_dropout"))

TYPES = {
    tuple: "a tuple of whole numbers",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def check_ranges(config: Mapping[str, Mapping[str, Any]]) -> None:
    """That each field on its own has a value that can work.

    Raises:
        UserError: the first that has not.
    """
    for section, field, choices in CHOICES:
        if config[section][field] not in choices:
            refuse(section, field, config[section][field], f"be one of {', '.join(map(str, choices))}")
    for section, field in POSITIVE:
        if not config[section][field] > 0:
            refuse(section, field, config[section][field], "be above 0")
    for section, field in NOT_NEGATIVE:
        if config[section][field] < 0:
            refuse(section, field, config[section][field], "be 0 or more")
    for section, field in BELOW_ONE:
        if not 0 <= config[section][field] < 1:
            refuse(section, field, config[section][field], "be at least 0 and under 1")
    for field in ("beta_start", "beta_end"):
        if not 0 < config["diffusion"][field] < 1:
            refuse("diffusion", field, config["diffusion"][field], "be above 0 and under 1")
    if not 0 < config["data"]["augment_share"] <= 1:
        refuse("data", "augment_share", config["data"]["augment_share"], "be above 0 and at most 1")
    if not 0 <= config["train"]["seed"] < 2**32:  # jax.random.key reads 32 bits: 2**32 would be 0 again
        refuse("train", "seed", config["train"]["seed"], f"be from 0 to {2**32 - 1}")


def refuse(section: str, field: str, value: Any, rule: str) -> NoReturn:
    """Raise the one sentence about a field."""
    raise UserError(f"config.{section}.{field} must {rule}, got {value!r}")


def check_section(section: str, fields: Any) -> None:
    """That there is such a section and that it holds fields."""
    if section not in DEFAULTS:
        raise UserError(f"config has no section {section!r}{_nearest(section, DEFAULTS)}")
    if not isinstance(fields, Mapping):
        raise UserError(
            f"config.{section} must hold fields, such as {min(DEFAULTS[section])}, got {fields!r}"
        )


def _default(section: str, field: str) -> Any:
    check_section(section, {})
    if field not in DEFAULTS[section]:
        raise UserError(f"config.{section} has no field {field!r}{_nearest(field, DEFAULTS[section])}")
    return DEFAULTS[section][field]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def typed(section: str, field: str, value: Any) -> Any:
    """The value, if it has its default's type; ints pass for floats and lists for tuples."""
    default = _default(section, field)
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return tuple(value)
    if type(value) is not kind or kind is tuple or (kind is float and not math.isfinite(value)):
        raise UserError(
            f"config.{section}.{field} must be {TYPES[kind]}, got {value!r}; the default is {default!r}"
        )
    return value


def parse(section: str, field: str, text: str) -> Any:
    """The value that a text means for a field: true and false in any case, text fields as they are, else a literal."""
    if isinstance(_default(section, field), str):
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower())
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = text
    return typed(section, field, value)
