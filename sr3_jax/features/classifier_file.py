"""Safetensors files of classifiers, and functions that all classifier networks share.

Shape legend: B batch, N images, D features, K classes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from sr3_jax.errors import UserError
from sr3_jax.features.weights import read_file
from sr3_jax.files import parse_json, safetensors_bytes
from sr3_jax.image_ops import pad_batch
from sr3_jax.storage import atomic_write


def write_classifier(
    path: Path, arrays: Mapping[str, np.ndarray], *, file_format: str, facts: Mapping[str, Any]
) -> None:
    """Write arrays, as float32, and JSON values as a .safetensors file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    flat = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    metadata = {"format": file_format, "classifier": json.dumps(facts, sort_keys=True)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(safetensors_bytes(flat, metadata))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): use another path") from error


def read_classifier(path: Path, *, file_format: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """The arrays, the JSON values and the SHA-256 of a file of `write_classifier`.

    Raises:
        UserError: the file cannot be read, or has another format.
    """
    with classifier_errors(path):
        _, sha256 = read_file(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise UserError(f"{path} is not a classifier: make one with sr3 train-classifier")
            names = file.keys()  # a list: the file itself is not iterable
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in names}
        return arrays, parse_json(metadata["classifier"]), sha256


def classifier_format(path: Path) -> str:
    """The format that a safetensors file declares, '' if none. UserError if it cannot be read."""
    with classifier_errors(path), safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("format", "")


@contextlib.contextmanager
def classifier_errors(path: Path) -> Iterator[None]:
    """Turn any error of reading a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as a classifier ({reason}): train it again") from None


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise UserError unless there are labels int [N], all in [0, num_classes)."""
    if not len(labels):
        raise UserError("there are no images to train on: use another data set")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}: use another data set"
        )


def check_images(images: np.ndarray | jax.Array) -> np.ndarray:
    """Images as an array on the host; ValueError unless they are uint8 [B,H,W,3]."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"a classifier takes uint8 images [B,H,W,3], got {images.dtype} {images.shape}")
    return images


def run_in_batches(
    run: Callable[[np.ndarray], jax.Array], images: np.ndarray | jax.Array, *, width: int, batch: int
) -> np.ndarray:
    """Apply `run` to uint8 [N,H,W,3] in batches of at most `batch`: float32 [N,width].

    Batches are padded to a power of two, so that the network is compiled for few sizes.

    Raises:
        ValueError: the images have another shape or type.
    """
    images = check_images(images)
    parts = [np.zeros((0, width), np.float32)]
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        padded = pad_batch(part, 1 << (len(part) - 1).bit_length())
        parts.append(np.asarray(run(padded))[: len(part)])
    return np.concatenate(parts)
