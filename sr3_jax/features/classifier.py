"""The project's own classifier: small, trained on the data at hand, one safetensors file.

Shape legend: B batch, H height, W width, D features, K classes. Its accuracy on a model's outputs is the paper's
recognition test (section 6.3) where the labels are our own; a Frechet distance of its features is called
'frechet_classifier', and compares with no published figure.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sr3_jax.errors import UserError
from sr3_jax.features.weights import read_file
from sr3_jax.files import atomic_write
from sr3_jax.image_ops import resize_bicubic, to_unit
from sr3_jax.nn.classifier import ClassifierNetwork
from sr3_jax.types import Key, Params

FORMAT = "sr3_jax.classifier.1"
AT_ONCE = 256  # images in one call of the network


@dataclass(frozen=True, eq=False)
class TrainedClassifier:
    """A network with its weights and the facts of its training.

    Attributes:
        name: of its file.
        sha256: of its file.
        height, width: of the images it was trained on; others are resized to that, by anti-aliased bicubic.
        about: how it was trained, and its accuracy: plain values, as in its file.
    """

    name: str
    sha256: str
    network: ClassifierNetwork
    params: Params
    height: int
    width: int
    about: Mapping[str, Any]
    kind: ClassVar[str] = "a small network of its own"
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

    def _outputs(self, images: np.ndarray | jax.Array) -> list[np.ndarray]:
        size = (self.height, self.width)
        run = functools.partial(_outputs, self.params, network=self.network, size=size)
        return in_parts(run, images, widths=(4 * self.network.width, self.num_classes), most=AT_ONCE)


def in_parts(
    run: Callable[[np.ndarray], tuple[jax.Array, ...]],
    images: np.ndarray | jax.Array,
    *,
    widths: Sequence[int],
    most: int,
) -> list[np.ndarray]:
    """What `run` makes of uint8 [B,H,W,3], given `most` of them or fewer at once: float32 [B,D] for each D of `widths`.

    ValueError on other types.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"a classifier takes uint8 images [B,H,W,3], got {images.dtype} {images.shape}")
    parts: list[list[np.ndarray]] = [[np.zeros((0, width), np.float32) for width in widths]]
    for first in range(0, len(images), most):
        part = images[first : first + most]
        # Filled up to a power of two, so that the network is compiled for a few sizes alone.
        filled = np.concatenate([part, np.repeat(part[-1:], _power(len(part)) - len(part), axis=0)])
        parts.append([np.asarray(one)[: len(part)] for one in run(filled)])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


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
        size: (height, width) of the images of the training.
        about: plain values that JSON takes.
    """
    flat = {
        ".".join(key.key for key in keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    layers = {name: getattr(network, name) for name in ("num_classes", "width", "patch", "blocks")}
    facts = {"network": layers, "height": size[0], "width": size[1], "about": dict(about)}
    write(path, flat, file_format=FORMAT, facts=facts)
    return load(path)


def load(path: Path) -> TrainedClassifier:
    """The classifier in a file of `save_classifier`. UserError if there is none."""
    with readable(path):
        arrays, facts, sha256 = read(path, file_format=FORMAT)
        params: dict[str, Any] = {}
        for name, array in arrays.items():
            *parents, leaf = name.split(".")
            branch = params
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = jnp.asarray(array)
        network = ClassifierNetwork(**facts["network"])
        size = (int(facts["height"]), int(facts["width"]))
        wanted = jax.eval_shape(lambda key: init_params(network, size, key), jax.random.key(0))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, wanted):
            raise UserError(f"the weights in {path} are not those of the network it names: train it again")
        return TrainedClassifier(path.name, sha256, network, params, *size, dict(facts["about"]))


def write(
    path: Path, arrays: Mapping[str, np.ndarray], *, file_format: str, facts: Mapping[str, Any]
) -> None:
    """Arrays, as float32, and plain values as a .safetensors file, whole or not at all."""
    flat = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    metadata = {"format": file_format, "classifier": json.dumps(facts, sort_keys=True)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_bytes(save(flat, metadata))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place") from error


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """UserError unless labels int [N] are there and all in [0, num_classes)."""
    if not len(labels):
        raise UserError("there are no images to learn from: name others")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}: name other images"
        )


def format_of(path: Path) -> str:
    """What `write` was told of a file; '' of any other. UserError if it cannot be read."""
    with readable(path), safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("format", "")


def read(path: Path, *, file_format: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """The arrays, the plain values and the SHA-256 of a file of `write`. UserError if it is of another format."""
    _, sha256 = read_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != file_format:
            raise UserError(
                f"{path} is a safetensors file but no classifier: make one with sr3 train-classifier"
            )
        arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118, it is no dict
    return arrays, json.loads(metadata["classifier"]), sha256


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file that is read inside is said in one sentence."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as a classifier ({reason}): train it again") from None


def init_params(network: ClassifierNetwork, size: tuple[int, int], key: Key) -> Params:
    """Fresh weights for images of that (height, width)."""
    return network.init(key, jnp.zeros((1, *size, 3)))["params"]
