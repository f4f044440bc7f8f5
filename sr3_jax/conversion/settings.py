"""The config of a model of others, from the flags or the JSON file of its training."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sr3_jax.config.build import check_config
from sr3_jax.config.load import complete, load_config
from sr3_jax.errors import UserError
from sr3_jax.image_io.errors import printable

PUBLISHED = ("adm_64_256", "adm_128_512")  # presets
_SCHEDULES = {"linear": "linear", "quad": "quadratic", "cosine": "cosine"}
_WIDTHS = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4)}  # by --large_size
# Flags of guided-diffusion's upsamplers with their defaults, which are in config.model or config.data.
_FLAGS = {
    "large_size": "256",
    "small_size": "64",
    "num_channels": "128",
    "num_res_blocks": "2",
    "num_heads": "4",
    "num_head_channels": "-1",
    "attention_resolutions": "16,8",
    "dropout": "0.0",
    "diffusion_steps": "1000",
    "use_scale_shift_norm": "true",
    "predict_xstart": "false",
}
# Those of which only one value is supported: the default, and the value.
_FIXED = {
    "noise_schedule": ("linear", "linear"),
    "resblock_updown": ("false", "true"),
    "rescale_timesteps": ("false", "false"),
    "num_heads_upsample": ("-1", "-1"),
}
# Those that do not change the network, or that its tensors show.
_IGNORED = (
    *("use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing"),
    *("class_cond", "learn_sigma"),
)


def flags_config(text: str) -> dict[str, Any]:
    """The config of an ADM upsampler from its flags, "--large_size 256 --num_channels 192 ...".

    The flags are those of guided-diffusion's super_res_train.py and super_res_sample.py, with the same defaults.

    Raises:
        UserError: an unknown flag, or a value that is not supported.
    """
    given = dict(_flag_pairs(text))
    for name in given:
        if name not in {*_FLAGS, *_FIXED, *_IGNORED}:
            raise UserError(f"--flags: --{name} is no flag of an ADM upsampler: omit it")
    for name, (default, only) in _FIXED.items():
        if given.get(name, default).lower() != only:
            raise UserError(f"--flags: --{name} must be {only}, got {given.get(name, default)}")
    values = _FLAGS | given
    try:
        size, small = int(values["large_size"]), int(values["small_size"])
        factors = [size // int(side) for side in values["attention_resolutions"].split(",")]
        numbers = {name: int(values[name]) for name in ("num_channels", "num_res_blocks", "num_heads")}
        head_channels, steps = int(values["num_head_channels"]), int(values["diffusion_steps"])
        dropout = float(values["dropout"])
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"--flags has a value that is not a number ({error}): write them as in training"
        ) from None
    if size not in _WIDTHS or small < 1 or size % small:
        raise UserError(
            f"--flags: --large_size {size} --small_size {small} is not supported: use 64, 256 or 512 and a divisor"
        )
    config = load_config(PUBLISHED[0])
    config["model"] |= {
        "channels": numbers["num_channels"],
        "multipliers": _WIDTHS[size],
        "num_blocks": (numbers["num_res_blocks"],) * len(_WIDTHS[size]),
        "attention_levels": tuple(level for level in range(len(_WIDTHS[size])) if 2**level in factors),
        "head_channels": max(head_channels, 0),
        "heads": numbers["num_heads"] if head_channels < 0 else 1,
        "film": values["use_scale_shift_norm"].lower() == "true",
        "dropout": dropout,
        "timesteps": steps,
    }
    config["diffusion"] |= {
        "prediction": "y0" if values["predict_xstart"].lower() == "true" else "eps",
        "num_steps": steps,
        "beta_start": 0.1 / steps if steps else 0.0,
        "beta_end": 20.0 / steps if steps else 0.0,
    }
    config["data"] |= {"crop": size, "scale": size // small}
    return _checked(config, "--flags")


def _flag_pairs(text: str) -> Iterator[tuple[str, str]]:
    try:
        words = shlex.split(text.replace("=", " "))
    except ValueError as error:
        raise UserError(f"--flags cannot be read ({error}): quote them as one text") from None
    if len(words) % 2 or any(not word.startswith("--") for word in words[::2]):
        raise UserError(f"--flags={text!r:.80} must be pairs of --NAME VALUE, as one quoted text")
    yield from ((name[2:], value) for name, value in zip(words[::2], words[1::2], strict=True))


def read_json_with_comments(path: Path) -> Any:
    try:
        text = path.read_text("utf-8")
        return json.loads(re.sub(r"//[^\n]*", "", text))
    except OSError as error:
        raise UserError(
            f"--json {printable(path)} cannot be read ({error.strerror}): check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--json {printable(path)} is not JSON ({error}): use the file of the training"
        ) from None


def port_config(given: Any, file: str) -> dict[str, Any]:
    """The config of a port of SR3 from the values of its JSON.

    Raises:
        UserError: a value is missing, of another type, or not supported.
    """

    def value(kind: type, *keys: str, default: Any = None) -> Any:
        found = given
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        found = default if found is None else found
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise UserError(f"{file}: {'.'.join(keys)} must be of type {kind.__name__}, got {found!r:.80}")
        return found

    def choice(options: Sequence[Any], *keys: str) -> Any:
        found = value(type(options[0]), *keys)
        if found not in options:
            raise UserError(
                f"{file}: {'.'.join(keys)} is {found!r:.80}, but only {', '.join(map(str, options))} works"
            )
        return found

    choice(("sr3",), "model", "which_model_G")
    conditional = value(bool, "model", "diffusion", "conditional")
    choice((6 if conditional else 3,), "model", "unet", "in_channel")
    choice((3,), "model", "unet", "out_channel")
    multipliers = value(list, "model", "unet", "channel_multiplier")
    size = value(int, "model", "diffusion", "image_size")
    attended = value(list, "model", "unet", "attn_res")
    train = ("model", "beta_schedule", "train")
    schedule = _SCHEDULES[choice(tuple(_SCHEDULES), *train, "schedule")]
    scale = 1
    if conditional:
        low = value(int, "datasets", "train", "l_resolution")
        if low < 1 or size % low:
            raise UserError(f"{file}: datasets.train.l_resolution must divide the size {size}, got {low}")
        scale = size // low
    config = load_config({
        "model": {
            "network": "sr3_port",
            "channels": value(int, "model", "unet", "inner_channel"),
            "multipliers": multipliers,
            "num_blocks": (value(int, "model", "unet", "res_blocks"),) * len(multipliers),
            "attention_levels": tuple(n for n in range(len(multipliers)) if size // 2**n in attended),
            "norm_groups": value(int, "model", "unet", "norm_groups", default=32),
            "dropout": value(float, "model", "unet", "dropout", default=0.0),
            "low_res": conditional,
        },
        "diffusion": {
            "schedule": schedule,
            "num_steps": value(int, *train, "n_timestep"),
            "beta_start": value(float, *train, "linear_start"),
            "beta_end": value(float, *train, "linear_end"),
        },
        "data": {"crop": size, "scale": scale},
    })  # fmt: skip
    return _checked(config, file)


def _checked(config: dict[str, Any], of: str) -> dict[str, Any]:
    try:
        check_config(complete(config))
    except UserError as error:
        raise UserError(f"{of}: there is no such network ({error})") from None
    return config
