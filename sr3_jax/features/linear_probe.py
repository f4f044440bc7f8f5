"""A linear probe on AlexNet: multinomial logistic regression on pooled features, for few labeled images.

AlexNet was trained on the sharp photographs of ImageNet, and its lower layers respond to texture. The probe is
therefore sensitive to blur, as the paper's ResNet-50 is; a small network trained on the data itself relies on colors
and outlines, which the low-res image has too. The weights are those of LPIPS.

Shape legend: B batch, N images, H height, W width, D features, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sr3_jax.errors import UserError
from sr3_jax.features.classifier_file import (
    check_labels,
    classifier_errors,
    read_classifier,
    run_in_batches,
    write_classifier,
)
from sr3_jax.features.lpips import LEAST_SIDE, Lpips, Weights, alexnet, load_lpips

FORMAT = "sr3_jax.linear.1"
BATCH = 64  # images per call of AlexNet
WIDTH = 64 + 192 + 384 + 256 + 256  # D: channels of the five convolutions
WEIGHT_DECAY = 1e-3  # factor of the squared weights, added to the mean cross-entropy
ITERATIONS = 200  # of L-BFGS


@dataclass(frozen=True, eq=False)
class Head:
    """Logits = (features - mean) / deviation @ kernel + bias: float32 [D], [D], [D,K], [K]."""

    mean: np.ndarray
    deviation: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float32 [N,D] -> float32 [N,K]."""
        return (features - self.mean) / self.deviation @ self.kernel + self.bias


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A head on AlexNet. `sha256` is that of the head's file; `info` describes its training, as stored there."""

    name: str
    sha256: str
    lpips: Lpips
    head: Head
    info: Mapping[str, Any]
    kind: ClassVar[str] = "a linear probe on AlexNet"
    least_side: ClassVar[int] = LEAST_SIDE

    @property
    def num_classes(self) -> int:
        return len(self.head.bias)

    def logits(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of at least 31x31 pixels -> float32 [B,K]. ValueError for other types."""
        return self.head.logits(features_of(self.lpips, images))


def features_of(lpips: Lpips, images: np.ndarray | jax.Array) -> np.ndarray:
    """uint8 [B,H,W,3] -> the spatial means of AlexNet's five convolutions, float32 [B,D].

    Images keep their size, as in LPIPS: resizing changes textures.

    Raises:
        ValueError: the images have another shape or type.
        UserError: a side is under 31 pixels.
    """
    images = np.asarray(images)
    if images.ndim == 4 and min(images.shape[1:3]) < LEAST_SIDE:
        raise UserError(
            f"AlexNet needs images of at least {LEAST_SIDE}x{LEAST_SIDE} pixels, got {images.shape[2]}x"
            f"{images.shape[1]}: use larger images or another classifier"
        )
    return run_in_batches(functools.partial(_features, lpips.weights), images, width=WIDTH, batch=BATCH)


@jax.jit
def _features(weights: Weights, images: jax.Array) -> jax.Array:
    layers = alexnet(weights, images.astype(jnp.float32))
    return jnp.concatenate([jnp.mean(layer, axis=(1, 2)) for layer in layers], axis=-1)


def train_head(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Head:
    """Fit the head to float32 [N,D] and labels int [N] in [0,K). The problem is convex, so there is no seed.

    Raises:
        UserError: a label is out of range.
    """
    check_labels(labels, num_classes)
    mean = features.mean(axis=0)
    deviation = features.std(axis=0) + 1e-6  # channels that are always 0 stay 0
    kernel, bias = _fit(jnp.asarray((features - mean) / deviation), jnp.asarray(labels), num_classes)
    return Head(mean, deviation, np.asarray(kernel), np.asarray(bias))


@functools.partial(jax.jit, static_argnums=2)
def _fit(x: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, bias = params
        logits = x @ kernel + bias.reshape(1, -1)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(entropy) + WEIGHT_DECAY * jnp.sum(jnp.square(kernel))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_: int, carry: Any) -> Any:
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
    return jax.lax.fori_loop(0, ITERATIONS, step, (params, solver.init(params)))[0]


def save(path: Path, head: Head, *, lpips: Lpips, info: Mapping[str, Any]) -> LinearProbe:
    """Write the file atomically and return the probe that `load` reads from it. `info`: JSON values."""
    arrays = {name: getattr(head, name) for name in ("mean", "deviation", "kernel", "bias")}
    facts = {"alexnet": lpips.sha256, "about": dict(info)}
    write_classifier(path, arrays, file_format=FORMAT, facts=facts)
    return load(path)


def load(path: Path) -> LinearProbe:
    """The probe in a file of `save`. UserError if it does not contain one, or AlexNet's weights are missing."""
    arrays, facts, sha256 = read_classifier(path, file_format=FORMAT)
    with classifier_errors(path):
        head = Head(**arrays)
        classes = len(head.bias)
        shapes = [head.mean.shape, head.deviation.shape, head.kernel.shape, head.bias.shape]
        if shapes != [(WIDTH,), (WIDTH,), (WIDTH, classes), (classes,)]:
            raise UserError(f"the weights in {path} do not match a linear probe on AlexNet: train it again")
        lpips = load_lpips()
        if facts["alexnet"] != lpips.sha256:
            raise UserError(
                f"{path} was trained on AlexNet weights other than the installed ones: train it again"
            )
        return LinearProbe(path.name, sha256, lpips, head, dict(facts["about"]))
