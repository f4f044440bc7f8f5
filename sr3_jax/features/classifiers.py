"""Classifiers of images, and top-k accuracy, as in the paper's tables of classification accuracy.

A classifier is a file of `sr3 train-classifier`, an ONNX file, or a user's function.

Shape legend: B batch, N images, H height, W width, D features, K classes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from sr3_jax.errors import UserError
from sr3_jax.features import linear_probe, onnx
from sr3_jax.features.classifier_file import (
    classifier_errors,
    classifier_format,
    read_classifier,
    run_in_batches,
)
from sr3_jax.image_ops import resize_bicubic, to_unit
from sr3_jax.nn.classifier import ClassifierNetwork
from sr3_jax.types import Key, Params

NETWORK_FORMAT = "sr3_jax.classifier.1"
BATCH = 256  # images per call of a small network


class Classifier(Protocol):
    """A classifier of images. `sha256` is that of its weights' file, or of a function's source file."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def num_classes(self) -> int:
        """K; 0 for a function that has not been called yet."""
        ...

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] -> float32 [B,K], logits or probabilities."""
        ...


@dataclass
class FunctionClassifier:
    """A user's function: uint8 [B,H,W,3] -> [B,K]."""

    name: str
    sha256: str
    function: Callable[[np.ndarray], np.ndarray]
    num_classes: int = 0

    def logits(self, images: np.ndarray) -> np.ndarray:
        found = np.asarray(self.function(images))
        if found.ndim != 2 or len(found) != len(images) or found.dtype.kind not in "fiu":
            raise UserError(
                f"classifier {self.name} must return numbers [B,K] for {len(images)} images, "
                f"got {found.dtype} {found.shape}"
            )
        self.num_classes = found.shape[1]
        return found.astype(np.float32)


@dataclass(frozen=True, eq=False)
class NetworkClassifier:
    """A small network that was trained from scratch (experiments/train_classifier.py).

    Attributes:
        sha256: of its file.
        height, width: size of the training images; other images are resized to it by anti-aliased bicubic.
        info: how it was trained, and its accuracy, as stored in its file.
    """

    name: str
    sha256: str
    network: ClassifierNetwork
    params: Params
    height: int
    width: int
    info: Mapping[str, Any]
    kind: ClassVar[str] = "a small network trained from scratch"
    protocol: ClassVar[str] = "frechet_classifier"  # the name of a Frechet distance in its features

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    def logits(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of any size -> float32 [B,K]. ValueError for other types."""
        return self._outputs(images)[:, self._features :]

    def features(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of any size -> the last layer's inputs, float32 [B,D]. ValueError for other types."""
        return self._outputs(images)[:, : self._features]

    @property
    def _features(self) -> int:
        return 4 * self.network.width

    def _outputs(self, images: np.ndarray | jax.Array) -> np.ndarray:
        size = (self.height, self.width)
        run = functools.partial(_network_outputs, self.params, network=self.network, size=size)
        return run_in_batches(run, images, width=self._features + self.num_classes, batch=BATCH)


@functools.partial(jax.jit, static_argnames=("network", "size"))
def _network_outputs(
    params: Params, images: jax.Array, *, network: ClassifierNetwork, size: tuple[int, int]
) -> jax.Array:
    """[B,D+K]: features and logits."""
    x = to_unit(images)
    if x.shape[1:3] != size:
        x = jnp.clip(resize_bicubic(x, *size), -1.0, 1.0)
    return jnp.concatenate(network.apply({"params": params}, x), axis=-1)  # type: ignore[arg-type]


def init_params(network: ClassifierNetwork, size: tuple[int, int], key: Key) -> Params:
    """Initial weights for images of (height, width)."""
    return network.init(key, jnp.zeros((1, *size, 3)))["params"]


def load_network(path: Path) -> NetworkClassifier:
    """The small network in a .safetensors file. UserError if it does not contain one."""
    arrays, facts, sha256 = read_classifier(path, file_format=NETWORK_FORMAT)
    with classifier_errors(path):
        params = unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep=".")
        network = ClassifierNetwork(**facts["network"])
        size = (int(facts["height"]), int(facts["width"]))
        expected = jax.eval_shape(lambda key: init_params(network, size, key), jax.random.key(0))
        if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
            raise UserError(f"the weights in {path} do not match its network: train it again")
        return NetworkClassifier(path.name, sha256, network, params, *size, dict(facts["about"]))


def load_classifier(spec: str) -> Classifier:
    """The classifier PATH.safetensors (of `sr3 train-classifier`), PATH.onnx[?OPTIONS] or MODULE:FUNCTION.

    A function gets uint8 images [B,H,W,3] and returns logits [B,K]; its module may be in the working directory.

    Raises:
        UserError: the classifier does not exist or cannot be read.
    """
    path, _, options = spec.partition("?")
    if path.endswith(".onnx"):
        return onnx.load(Path(os.path.expanduser(path)), options)
    if spec.endswith(".safetensors"):
        file = Path(os.path.expanduser(spec))
        if classifier_format(file) == linear_probe.FORMAT:
            return linear_probe.load(file)
        return load_network(file)
    module_name, colon, name = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")])):
        raise UserError(
            f"unknown classifier {spec!r}: use a .safetensors file of sr3 train-classifier, an .onnx file, or "
            "MODULE:FUNCTION"
        )
    return _function(spec, module_name, name)


def _function(spec: str, module_name: str, name: str) -> FunctionClassifier:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"classifier {spec} cannot be imported ({error}): use a function of a module"
        ) from error
    if not callable(found):
        raise UserError(f"classifier {spec} must be a function, got {type(found).__name__}")
    try:
        source = Path(inspect.getfile(sys.modules[module_name])).read_bytes()
    except (TypeError, OSError):  # built in
        source = b""
    return FunctionClassifier(
        spec, hashlib.sha256(source).hexdigest(), found, getattr(found, "num_classes", 0)
    )


def correct(logits: np.ndarray, labels: np.ndarray, *, top: int = 1) -> np.ndarray:
    """Whether each label is among the `top` largest logits: bool [N] for logits [N,K] and labels int [N].

    Ties are broken in favor of the lower class, so a constant output is right for `top` classes only.

    Raises:
        UserError: a label is not below K, or a logit is not finite.
    """
    labels = np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N,K] and labels [N], got {logits.shape} and {labels.shape}")
    classes = logits.shape[1]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels from {labels.min()} to {labels.max()} do not match a classifier of {classes} classes: "
            "use one that was trained for this data set"
        )
    if not np.isfinite(logits).all():
        raise UserError("the classifier's logits are not finite: use another classifier")
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    return (order[:, :top] == labels[:, None]).any(axis=1)
