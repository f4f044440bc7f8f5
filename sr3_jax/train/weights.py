"""Load the weights of a trained model from a workdir, an exported .safetensors file or a shipped model; export them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from sr3_jax.config.load import complete_stored
from sr3_jax.errors import UserError
from sr3_jax.files import parse_json, safetensors_bytes
from sr3_jax.storage import as_path, atomic_write, is_file, is_folder, is_url, local_copy
from sr3_jax.train.checkpoints import CONFIG_FILE, first_line, load_ema, read_config
from sr3_jax.types import Params

FORMAT = "sr3_jax.1"
SHIPPED = Path(__file__).parent.parent / "models"


class Weights(NamedTuple):
    """Weights of a trained model.

    Attributes:
        params: float32, the EMA of training.
        config: the config of the training run.
        name: for messages.
    """

    params: Params
    config: dict[str, Any]
    name: str


def locate_model(path_or_name: str | Path) -> Path:
    """The workdir or .safetensors file of a model, given its path or the name of a shipped model.

    Raises:
        UserError: the model does not exist.
    """
    given = as_path(path_or_name)
    for path in (given,) if is_url(given) else (given, SHIPPED / f"{path_or_name}.safetensors"):
        if is_folder(path) or is_file(path):
            return path
    names = ", ".join(shipped_models()) or "none"
    raise UserError(
        f"no model {str(path_or_name)!r}: give a workdir, a .safetensors file or the name of a shipped model ({names})"
    )


def shipped_models() -> list[str]:
    """Names of the models in this package."""
    return sorted(file.stem for file in SHIPPED.glob("*.safetensors"))


def load_weights(path_or_name: str | Path) -> Weights:
    """Load the newest checkpoint of a workdir, an exported file or a shipped model.

    Raises:
        UserError: the model does not exist or cannot be read.
    """
    path = locate_model(path_or_name)
    if not path.is_dir():
        params, config = read_export(path)
        return Weights(params, config, path.name if is_file(as_path(path_or_name)) else str(path_or_name))
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"model {path} has no {CONFIG_FILE}: give a workdir that sr3 train has written")
    config = read_config(path)
    params, step = load_ema(path)
    return Weights(params, config, f"{path} at step {step}")


def export(path: Path, params: Params, config: Mapping[str, Any], *, dtype: str = "float32") -> None:
    """Write weights and config to one safetensors file, atomically.

    Args:
        dtype: 'float32', or 'bfloat16' for half the size and about three significant digits.

    Raises:
        UserError: the file cannot be written, or `dtype` is unknown.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    flat = {
        name: np.ascontiguousarray(np.asarray(leaf).astype(jax.numpy.dtype(dtype)))
        for name, leaf in flatten_dict(params, sep=".").items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "config": json.dumps(config, sort_keys=True)}
        with atomic_write(path) as file:
            file.write(safetensors_bytes(flat, metadata))  # save_file would leave it unreadable to others
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}): use another path") from error


def read_export(path: Path) -> tuple[Params, dict[str, Any]]:
    """The float32 weights and the config in an exported file.

    Raises:
        UserError: the file cannot be read, or was not written by `export`.
    """
    with _opened(path) as (file, config):
        names = file.keys()  # a list: the file itself is not iterable
        flat = {name: np.asarray(file.get_tensor(name)).astype(np.float32) for name in names}
        return unflatten_dict(flat, sep="."), config


def read_export_config(path: Path) -> dict[str, Any]:
    """The config in an exported file, without reading the weights. Raises UserError like `read_export`."""
    with _opened(path) as (_, config):
        return config


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        with local_copy(path) as local, safe_open(local, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} is a safetensors file but not an sr3_jax model: use one written by sr3 export"
                )
            if "config" not in metadata:
                raise UserError(f"{path} has no config: export the model again with sr3 export")
            yield file, complete_stored(parse_json(metadata["config"]), f"model {path}")
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        remedies = {
            **dict.fromkeys((".pt", ".pth"), "make a model of it with sr3 convert"),
            **dict.fromkeys((".onnx", ".stablehlo"), "it is for other programs, use the .safetensors file"),
        }
        remedy = remedies.get(path.suffix, "use a .safetensors file written by sr3 export")
        raise UserError(f"model {path} cannot be read ({first_line(error)}): {remedy}") from None
