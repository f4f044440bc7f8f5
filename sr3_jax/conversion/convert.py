"""Convert published PyTorch weights of other diffusion models for super-resolution into models of this package.

Two families, which are recognized by the names of their tensors:

- `adm`: the upsamplers of guided-diffusion, https://github.com/openai/guided-diffusion.
- `sr3_port`: SR3 by Janspiry, https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement, with the
  JSON file that it was trained with.

The networks are `nn.adm_unet` and `nn.sr3_port_unet`; a converted file has a config like that of any exported model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sr3_jax.config.build import build_network, build_schedule, init_params
from sr3_jax.config.load import load_config
from sr3_jax.conversion.settings import PUBLISHED, flags_config, port_config, read_json_with_comments
from sr3_jax.errors import UserError
from sr3_jax.features.weights import read_arrays, read_file
from sr3_jax.image_io.errors import printable
from sr3_jax.nn.unet import Network
from sr3_jax.types import Params

VARIANCES = ("drop", "learned")
LEARNED_STEPS = 250  # as its authors sample
_NAMED = 3  # tensors in an error message

# How the tensors of a family are called, from the names of our parameters. In both, modules in lists are numbered:
# `input_blocks_4_1` is input_blocks.4.1.
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "adm": (
        (r"^norm_out$", "out.0"),
        (r"^conv_out$", "out.2"),
        (r"norm_in$", "in_layers.0"),
        (r"conv_in$", "in_layers.2"),
        (r"embedding$", "emb_layers.1"),
        (r"norm_out$", "out_layers.0"),
        (r"conv_out$", "out_layers.3"),
        (r"skip$", "skip_connection"),
        (r"\.out$", ".proj_out"),
    ),
    "sr3_port": (
        (r"^norm_out$", "final_conv.block.0"),
        (r"^conv_out$", "final_conv.block.3"),
        (r"norm_in$", "block1.block.0"),
        (r"conv_in$", "block1.block.3"),
        (r"embedding$", "noise_func.noise_func.0"),
        (r"norm_out$", "block2.block.0"),
        (r"conv_out$", "block2.block.3"),
        (r"skip$", "res_conv"),
        (r"(?<=\d)_(res_block|attn|conv)(?=$|\.)", r".\1"),
    ),
}
_ANCHOR = {"adm": "input_blocks.0.0.weight", "sr3_port": "noise_level_mlp.1.weight"}
_SETTINGS = {"adm": "--flags", "sr3_port": "--json"}
# Tensors of the port that are no weights: its noise schedule.
_PORT_TABLES = re.compile(r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*)$")


@dataclass(frozen=True)
class Converted:
    """A converted model.

    Attributes:
        config: complete.
        sha256: of the file, in hex.
        notes: what the user should know, one sentence each.
    """

    params: Params
    config: dict[str, Any]
    sha256: str
    notes: tuple[str, ...]


def convert(
    path: Path, *, variance: str = "drop", flags: str | None = None, json_file: Path | None = None
) -> Converted:
    """Read the weights of a PyTorch or safetensors file as a model of this package. No code in the file is run.

    Args:
        path: a state dict, in groups or with a prefix such as 'module.'.
        variance: what to do with the variance that an ADM upsampler predicts: 'drop' it, or keep it as 'learned', for
            the solver `ancestral_learned`.
        flags: the command-line flags with which an ADM upsampler was trained; None for a published one.
        json_file: the configuration with which the port of SR3 was trained.

    Raises:
        UserError: the file cannot be read, is of another architecture, or lacks tensors.
    """
    content, sha256 = read_file(path)
    arrays = read_arrays(content, printable(path))
    del content  # as large as the arrays
    family, arrays = _recognize(arrays, printable(path))
    if family == "sr3_port":
        for name, value in (("--flags", flags), ("--variance", variance if variance != "drop" else None)):
            if value is not None:
                raise UserError(
                    f"{name}={value} is for ADM upsamplers, but {printable(path)} is a port of SR3: omit it"
                )
        if json_file is None:
            raise UserError(
                f"{printable(path)} is a port of SR3: give the JSON that it was trained with as --json"
            )
        config = port_config(read_json_with_comments(json_file), printable(json_file))
        _check_betas(arrays, config, printable(json_file))
        arrays = {name: value for name, value in arrays.items() if not _PORT_TABLES.match(name)}
        return Converted(to_params(arrays, config, printable(path)), config, sha256, ())
    if json_file is not None:
        raise UserError(
            f"--json is for ports of SR3, but {printable(path)} is an ADM upsampler: give its --flags"
        )
    config, notes = adm_config(arrays, flags, printable(path), variance)
    if not config["model"]["learned_variance"]:
        arrays |= {name: arrays[name][:3] for name in ("out.2.weight", "out.2.bias") if name in arrays}
    return Converted(to_params(arrays, config, printable(path)), config, sha256, notes)


def _recognize(arrays: dict[str, np.ndarray], file: str) -> tuple[str, dict[str, np.ndarray]]:
    """The family of a state dict, and its tensors without the prefix of their names."""
    for family, anchor in _ANCHOR.items():
        prefixes = [name.removesuffix(anchor) for name in arrays if name.endswith(anchor)]
        if len(prefixes) > 1:
            found = ", ".join(repr(prefix) for prefix in prefixes[:_NAMED])
            raise UserError(
                f"{file} has several networks, called {found:.200}: save one of them as a file of its own"
            )
        if prefixes:
            outer = prefixes[0].removesuffix("denoise_fn.")  # the port's tables are next to the network
            names = {name: name.removeprefix(prefixes[0]).removeprefix(outer) for name in arrays}
            return family, {names[name]: value for name, value in arrays.items()}
    known = " or ".join(f"{anchor!r}" for anchor in _ANCHOR.values())
    first = ", ".join(sorted(arrays)[:_NAMED])
    raise UserError(
        f"{file} is neither an upsampler of guided-diffusion nor a port of SR3: its tensors are {first:.200}, ..., and "
        f"none is called {known}"
    )


def tensor_name(family: str, path: str) -> str:
    """The name of a tensor of `adm` or `sr3_port` from that of our parameter: 'time_embed_0.kernel'."""
    module, _, leaf = path.rpartition(".")
    for pattern, name in _RENAMED[family]:
        module = re.sub(pattern, name, module)
    module = re.sub(
        r"(?<=[a-z])_(\d+)(?:_(\d+))?(?=$|\.)", lambda m: "." + ".".join(filter(None, m.groups())), module
    )
    return f"{module}.{'bias' if leaf == 'bias' else 'weight'}"


@functools.cache
def _shapes(network: Network) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a network's parameters by dotted name."""
    tree = jax.eval_shape(lambda key: init_params(network, key), jax.random.key(0))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep=".").items()}


def shapes_of_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a config's network in PyTorch.

    Without trailing axes of 1: 1x1 convolutions in one and two dimensions and dense layers are the same.
    """
    family = config["model"]["network"]
    return {
        tensor_name(family, name): _trimmed(
            (shape[-1], shape[-2], *shape[:-2]) if name.endswith(".kernel") else shape
        )
        for name, shape in _shapes(build_network(config["model"])).items()
    }


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    return _trimmed(shape[:-1]) if len(shape) > 2 and shape[-1] == 1 else shape


def _differences(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> list[str]:
    """What does not fit between tensors and config, one phrase for each tensor."""
    wanted = shapes_of_tensors(config)
    missing = [f"{name} is missing" for name in wanted if name not in arrays]
    unused = [f"{name} is not used" for name in arrays if name not in wanted]
    wrong = [
        f"{name} has shape {arrays[name].shape} instead of {shape}"
        for name, shape in wanted.items()
        if name in arrays and _trimmed(arrays[name].shape) != shape
    ]
    return missing + wrong + unused


def to_params(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], file: str) -> Params:
    """The parameters of a network from its tensors; UserError if they do not fit."""
    problems, family = _differences(arrays, config), config["model"]["network"]
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise UserError(
            f"{file} does not fit its network, config.model.network={family} "
            f"({'; '.join(problems[:_NAMED])}{more}): use the whole file, with the {_SETTINGS[family]} of its training"
        )
    return unflatten_dict(
        {
            name: _parameter(arrays[tensor_name(family, name)], name, shape)
            for name, shape in _shapes(build_network(config["model"])).items()
        },
        sep=".",
    )


def _parameter(tensor: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(".kernel"):  # [out,in,...] to [...,in,out]
        tensor = tensor.reshape(shape[-1], shape[-2], *shape[:-2])
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    return np.ascontiguousarray(tensor, np.float32)


def adm_config(
    arrays: Mapping[str, np.ndarray], flags: str | None, file: str, variance: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of an upsampler, and notes."""
    rows = len(arrays["out.2.weight"]) if "out.2.weight" in arrays else 6
    classes = len(arrays["label_emb.weight"]) if "label_emb.weight" in arrays else 0
    notes = []
    if variance == "learned" and rows != 6:
        raise UserError(f"--variance=learned, but {file} predicts no variance: omit it")
    if variance == "drop" and rows == 6:
        notes.append(
            "its learned variance was dropped: --variance learned keeps it, for solver ancestral_learned"
        )

    def fitted(config: dict[str, Any]) -> dict[str, Any]:
        config["model"] |= {"num_classes": classes, "learned_variance": variance == "learned"}
        if variance == "learned":
            config["sampling"] |= {"solver": "ancestral_learned", "steps": LEARNED_STEPS}
        return config

    if flags is not None:
        return fitted(flags_config(flags)), tuple(notes)
    if _trimmed(arrays["input_blocks.0.0.weight"].shape) != (192, 6, 3, 3):
        raise UserError(
            f"{file} is an ADM network, but not one of the published upsamplers ({', '.join(PUBLISHED)}): give the "
            "flags that it was trained with as --flags"
        )
    cut = {
        name: value[:3] if variance == "drop" and name.startswith("out.2.") else value
        for name, value in arrays.items()
    }
    candidates = {name: fitted(load_config(name)) for name in PUBLISHED}
    problems = {name: len(_differences(cut, config)) for name, config in candidates.items()}
    nearest = min(PUBLISHED, key=lambda name: problems[name])
    return candidates[nearest], (f"it is {nearest}", *notes)


def _check_betas(arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], file: str) -> None:
    """UserError if the file has another noise schedule than the JSON. Files store the one that they were saved with."""
    wanted = build_schedule(config["diffusion"]).beta
    found = arrays.get("betas", wanted)
    if found.shape == wanted.shape and not np.allclose(found, wanted, rtol=1e-3, atol=1e-9):
        raise UserError(
            f"{file}: beta_schedule.train is not the noise schedule of the weights, whose betas are {found[0]:.3g} to "
            f"{found[-1]:.3g}: use the JSON of the training"
        )
