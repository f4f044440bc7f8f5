"""The project's own classifier: small, trained on the data at hand, one safetensors file.

Shape legend: B batch, H height, W width, D features, K classes. Its accuracy on a model's outputs is the paper's
recognition test (section 6.3) where the labels are our own; a Frechet distance of its features is called
'frechet_classifier', and compares with no published figure.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sr3_jax.aliases import Key, Params, UserError
from sr3_jax.features.weights import read_file
from sr3_jax.images import resize_bicubic, to_unit
from sr3_jax.nn.classifier import ClassifierNetwork

FORMAT = "sr3_jax.classifier.1"
AT_ONCE = 256  # pictures in one call of the network


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A network with its weights and the facts of its training.

    Attributes:
        name: of its file.
        sha256: of its file.
        height, width: of the pictures it was trained on; others are resized to that, by anti-aliased bicubic.
        about: how it was trained, and its accuracy: plain values, as in its file.
    """

    name: str
    sha256: str
    network: ClassifierNetwork
    params: Params
    height: int
    width: int
    about: Mapping[str, Any]
    protocol: ClassVar[str] = "frechet_classifier"  # what a Frechet distance of its features is called

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    def logits(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of any size -> float32 [B,K]. ValueError on other types."""
        return self._outputs(images)[1]

    def features(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of any size -> what the last layer sees, float32 [B,D]. ValueError on other types."""
        return self._outputs(images)[0]

    def _outputs(self, images: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"a classifier takes uint8 pictures [B,H,W,3], got {images.dtype} {images.shape}"
            )
        parts = []
        for first in range(0, len(images), AT_ONCE):
            part = images[first : first + AT_ONCE]
            # Filled up to a power of two, so that the network is compiled for a few sizes alone.
            filled = np.concatenate([part, np.repeat(part[-1:], _power(len(part)) - len(part), axis=0)])
            found = _outputs(self.params, filled, network=self.network, size=(self.height, self.width))
            parts.append([np.asarray(one)[: len(part)] for one in found])
        widths = (4 * self.network.width, self.num_classes)
        empty = [np.zeros((0, width), np.float32) for width in widths]
        features, logits = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
        return features, logits


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("network", "size"))
def _outputs(
    params: Params, images: jax.Array, *, network: ClassifierNetwork, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    x = to_unit(images)
    if x.shape[1:3] != size:
        x = jnp.clip(resize_bicubic(x, *size), -1.0, 1.0)
    features, logits = network.apply({"params": params}, x)  # type: ignore[misc]
    return features, logits


def save_classifier(
    path: Path, network: ClassifierNetwork, params: Params, *, size: tuple[int, int], about: Mapping[str, Any]
) -> TrainedClassifier:
    """Write the file, whole or not at all, and return what `load` makes of it.

    Args:
        size: (height, width) of the pictures of the training.
        about: plain values that JSON takes.
    """
    flat = {
        ".".join(key.key for key in keys): np.ascontiguousarray(leaf, np.float32)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    layers = {name: getattr(network, name) for name in ("num_classes", "width", "patch", "blocks")}
    facts = {"network": layers, "height": size[0], "width": size[1], "about": dict(about)}
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(flat, {"format": FORMAT, "classifier": json.dumps(facts, sort_keys=True)}))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return load(path)


def load(path: Path) -> TrainedClassifier:
    """The classifier in a file of `save_classifier`. UserError if there is none."""
    _, sha256 = read_file(path)
    params: dict[str, Any] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} is a safetensors file but no classifier: make one with sr3 train-classifier"
                )
            for name in file.keys():  # noqa: SIM118, it is no dict
                *parents, leaf = name.split(".")
                branch = params
                for parent in parents:
                    branch = branch.setdefault(parent, {})
                branch[leaf] = jnp.asarray(file.get_tensor(name), jnp.float32)
        facts = json.loads(metadata["classifier"])
        network = ClassifierNetwork(**facts["network"])
        size = (int(facts["height"]), int(facts["width"]))
        wanted = jax.eval_shape(lambda key: init_params(network, size, key), jax.random.key(0))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
            raise UserError(f"the weights in {path} are not those of the network it names: train it again")
        about = dict(facts["about"])
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as a classifier ({reason}): train it again") from None
    return TrainedClassifier(path.name, sha256, network, params, *size, about)


def init_params(network: ClassifierNetwork, size: tuple[int, int], key: Key) -> Params:
    """Fresh weights for pictures of that (height, width)."""
    return network.init(key, jnp.zeros((1, *size, 3)))["params"]
