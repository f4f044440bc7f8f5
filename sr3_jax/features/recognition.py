"""Recognition accuracy on outputs, as in the paper's classifier tables, with any classifier.

Shape legend: B batch, N images, H height, W width, K classes.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sr3_jax.errors import UserError
from sr3_jax.features import classifier, linear_probe, onnx


class Classifier(Protocol):
    """What names images. `sha256` is that of its weights' file (of its source file, for a function)."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def num_classes(self) -> int:
        """K; 0 for a function that has not been called yet."""
        ...

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,H,W,3] -> float32 [B,K]: the greatest is the class. Logits, or probabilities."""
        ...


@dataclass
class FunctionClassifier:
    """A function of the user: uint8 [B,H,W,3] -> [B,K]."""

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


def load_classifier(spec: str) -> Classifier:
    """The classifier that PATH.safetensors (of `sr3 train-classifier`), PATH.onnx[?OPTIONS] or MODULE:FUNCTION names.

    Of the last, the function is called with uint8 images [B,H,W,3] and returns logits [B,K]; modules of the working
    directory are found. UserError if there is no such classifier.
    """
    path, _, options = spec.partition("?")
    if path.endswith(".onnx"):
        return onnx.load(Path(path).expanduser(), options)
    if spec.endswith(".safetensors"):
        file = Path(spec).expanduser()
        return (
            linear_probe.load(file)
            if classifier.format_of(file) == linear_probe.FORMAT
            else classifier.load(file)
        )
    module_name, colon, name = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module_name.split("."), *name.split(".")])):
        raise UserError(
            f"classifier {spec!r} is none: give a .safetensors file of sr3 train-classifier, an .onnx file, or "
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
            f"classifier {spec} cannot be imported ({error}): name a function of a module"
        ) from error
    if not callable(found):
        raise UserError(f"classifier {spec} is a {type(found).__name__}, not a function of images")
    try:
        source = Path(inspect.getfile(sys.modules[module_name])).read_bytes()
    except (TypeError, OSError):  # built in
        source = b""
    return FunctionClassifier(
        spec, hashlib.sha256(source).hexdigest(), found, getattr(found, "num_classes", 0)
    )


def correct(logits: np.ndarray, labels: np.ndarray, *, top: int = 1) -> np.ndarray:
    """Whether the label is among the `top` greatest of the logits: bool [N], of [N,K] and int [N].

    Of equal logits the class with the lower number is the greater. UserError if a label is not below K, or a logit is
    not a number.
    """
    labels = np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits [N,K] and labels [N] are needed, got {logits.shape} and {labels.shape}")
    classes = logits.shape[1]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels from {labels.min()} to {labels.max()} are not those of a classifier of {classes} classes: "
            "take one of this data set"
        )
    if not np.isfinite(logits).all():
        raise UserError("the classifier's logits are not finite: take another")
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")
    return (order[:, :top] == labels[:, None]).any(axis=1)
