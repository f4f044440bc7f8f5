"""Load models: from a workdir, an exported file, or by the name of a shipped model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sr3_jax.config.build import build_network, build_schedule, build_space, check_params
from sr3_jax.config.load import complete_stored
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import find_sampling
from sr3_jax.sampling import Sampling
from sr3_jax.storage import as_path
from sr3_jax.train.weights import load_weights, locate_model
from sr3_jax.types import Params


def from_config(config: Mapping[str, Any], params: Params, *, name: str) -> Model:
    """A model from its parameters and the config that a workdir or an export stores.

    Raises:
        UserError: the config is not of this version or an older one, or the parameters do not fit it.
    """
    config = complete_stored(config, f"model {name}")
    diffusion = config["diffusion"]
    network = build_network(config["model"])
    check_params(network, params, name)
    return Model(
        name=name,
        network=network,
        params=jax.tree.map(jnp.asarray, params),  # to the device once, not at each use
        schedule=build_schedule(diffusion),
        space=build_space(diffusion),
        prediction=diffusion["prediction"],
        scale=config["data"]["scale"],
        sampling=Sampling(**config["sampling"]),
        config=config,
    )


def load(path_or_name: str | os.PathLike[str]) -> Model:
    """Load a model from a workdir, an exported .safetensors file, or by the name of a shipped model.

    Its sampling settings are those that `sr3 search-schedule` stored next to it, if they are for these weights.

    Args:
        path_or_name: for example 'photo_4x', 'runs/mine', 'mine.safetensors' or 'gs://BUCKET/runs/mine'.

    Raises:
        UserError: the model does not exist or cannot be read.
    """
    path = as_path(path_or_name)
    weights = load_weights(path)
    model = from_config(weights.config, weights.params, name=weights.name)
    settings = find_sampling(
        locate_model(path),
        own=model.sampling,
        params=model.params,
        config=weights.config,
        name=weights.name,
    )
    return replace(model, sampling=settings)
