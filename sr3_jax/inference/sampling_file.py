"""The file that stores the sampling settings found for a model: `sampling.json`.

`sr3 search-schedule` writes it into a workdir, or as NAME.sampling.json next to NAME.safetensors; `load` uses it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax.config.schema import lookup
from sr3_jax.errors import UserError, printable
from sr3_jax.files import read_json, sha256_hex, write_text
from sr3_jax.sampling import Sampling
from sr3_jax.storage import is_file, is_folder
from sr3_jax.types import Params

_log = logging.getLogger("sr3_jax")
FORMAT = "sr3_jax.sampling.2"
FILE = "sampling.json"
# Fields that fingerprints of older versions lack; at their defaults they must not change a fingerprint.
_LATER = ("network", "heads", "norm_groups", "timesteps", "learned_variance")


@dataclass(frozen=True)
class StoredSampling:
    """Sampling settings and what they were found for.

    Attributes:
        weights: `params_fingerprint` of the weights that they were searched with.
        config: `config_fingerprint` of the model's config.
        model: the model's name.
        found: how they were found: metric, data, scores; plain values.
    """

    sampling: Sampling
    weights: str
    config: str
    model: str
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def params_fingerprint(params: Params) -> str:
    """SHA-256 of weights: names, shapes, dtypes and bytes, whatever file they came from."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sha256_hex({jax.tree_util.keystr(path): sha256_hex(np.asarray(leaf)) for path, leaf in leaves})


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the config fields that determine the network and its noise: the same for all steps of a run."""
    values = {name: config[name] for name in ("model", "diffusion")} | {"scale": config["data"]["scale"]}
    values["model"] = {
        name: value
        for name, value in config["model"].items()
        if name not in _LATER or value != lookup("model", name).default
    }
    if config["data"]["upsampling"] != "bicubic":
        values["upsampling"] = config["data"]["upsampling"]
    return sha256_hex(values)


def sampling_path(model: Path) -> Path:
    """The sampling file of a workdir or of a .safetensors file."""
    if is_folder(model):
        return model / FILE
    return model.with_name(f"{model.name.removesuffix('.safetensors')}.{FILE}")


def write_sampling(path: Path, stored: StoredSampling) -> None:
    """Write a sampling file. UserError if it cannot be written."""
    values = {"format": FORMAT, **dataclasses.asdict(stored)}
    try:
        write_text(path, json.dumps(values, indent=2) + "\n")
    except UserError as error:
        raise UserError(
            f"{path} cannot be written: export the model to your own folder with sr3 export"
        ) from error


def store_sampling(
    path: Path,
    sampling: Sampling,
    *,
    params: Params,
    config: Mapping[str, Any],
    name: str,
    found: Mapping[str, Any],
) -> None:
    """Write settings that were found for a model. UserError if they cannot be written."""
    write_sampling(
        path, StoredSampling(sampling, params_fingerprint(params), config_fingerprint(config), name, found)
    )


def read_sampling(path: Path) -> StoredSampling:
    """Read a file of `write_sampling`. UserError for any other file."""
    try:
        values = read_json(path)
        if values.pop("format") != FORMAT:
            raise UserError("unknown format version")
        return StoredSampling(sampling=Sampling(**values.pop("sampling")), **values)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except KeyError as error:
        reason = f"it lacks {error}"
    except (UserError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise UserError(
        f"{path} is not a valid sampling file ({reason}): delete it, or run sr3 search-schedule again"
    )


def copy_sampling(source: Path, target: Path, sampling: Sampling, *, params: Params, name: str) -> bool:
    """Write the settings that model `source` uses for its export `target` with weights `params`.

    The export samples as its source does, although the precision of its weights may differ.

    Returns:
        Whether the source has a sampling file that it uses (one whose settings are `sampling`).
    """
    file = sampling_path(source)
    stored = read_sampling(file) if is_file(file) else None
    if stored is None or stored.sampling != sampling:
        return False
    found = {**stored.found, "searched_with": stored.model}
    copy = dataclasses.replace(stored, weights=params_fingerprint(params), model=name, found=found)
    write_sampling(sampling_path(target), copy)
    return True


def find_sampling(
    path: Path, *, own: Sampling, params: Params, config: Mapping[str, Any], name: str
) -> Sampling:
    """The settings stored for the model at `path`, or `own` if none are stored for it.

    Settings found for other weights are ignored with a warning. An exception is a workdir, whose weights change as
    training continues: its file is also used for later steps of the same run, with a warning, since the best noise
    levels change little. Settings for another network or noise schedule are never used.

    Raises:
        UserError: the file is damaged.
    """
    file = sampling_path(path)
    if not is_file(file):
        return own
    stored = read_sampling(file)
    if stored.weights == params_fingerprint(params):
        return stored.sampling
    if is_folder(path) and stored.config == config_fingerprint(config):
        _log.warning(
            "%s was found with %s and is used for %s too; run sr3 search-schedule again after training",
            file, printable(stored.model), name,
        )  # fmt: skip
        return stored.sampling
    _log.warning(
        "%s was found for other weights (%s) than those of %s and is ignored; run sr3 search-schedule again",
        file, printable(stored.model), name,
    )  # fmt: skip
    return own
