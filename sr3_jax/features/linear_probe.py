"""A linear layer on what AlexNet sees: the usual way to a classifier of few labelled images.

AlexNet was trained on ImageNet's sharp photographs, and its lower layers tell textures apart: so this classifier
stumbles over blur as the paper's ResNet-50 does, where a small network trained on the data at hand goes by colours and
outlines, which the low-resolution image has as well. The weights of AlexNet are those of LPIPS.

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
from sr3_jax.features.classifier import check_labels, in_parts, read, readable, write
from sr3_jax.features.lpips import LEAST_SIDE, Lpips, Weights, alexnet, load_lpips

FORMAT = "sr3_jax.linear.1"
AT_ONCE = 64  # images in one call of AlexNet
WIDTH = 64 + 192 + 384 + 256 + 256  # D: the channels of its five convolutions
DECAY = 1e-3  # of the squared weights, beside the mean cross-entropy
ITERATIONS = 200


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
class LinearClassifier:
    """A head on AlexNet, with the facts of its training. `sha256` is that of the head's file, `about` as there."""

    name: str
    sha256: str
    lpips: Lpips
    head: Head
    about: Mapping[str, Any]
    kind: ClassVar[str] = "a linear layer on LPIPS's AlexNet"
    least_side: ClassVar[int] = LEAST_SIDE

    @property
    def num_classes(self) -> int:
        return len(self.head.bias)

    def logits(self, images: np.ndarray | jax.Array) -> np.ndarray:
        """uint8 [B,H,W,3] of 31 pixels a side at least -> float32 [B,K]. ValueError on other types."""
        return self.head.logits(features_of(self.lpips, images))


def features_of(lpips: Lpips, images: np.ndarray | jax.Array) -> np.ndarray:
    """uint8 [B,H,W,3] -> the mean over the places of what each convolution gives: float32 [B,D].

    At the images' own size, as in LPIPS: shrunk or enlarged images have other textures.

    Raises:
        ValueError: on other types.
        UserError: a side is under 31 pixels.
    """
    images = np.asarray(images)
    if images.ndim == 4 and min(images.shape[1:3]) < LEAST_SIDE:
        raise UserError(
            f"AlexNet needs images of {LEAST_SIDE}x{LEAST_SIDE} pixels at least, got {images.shape[2]}x"
            f"{images.shape[1]}: train the classifier without --features=alexnet"
        )
    return in_parts(functools.partial(_features, lpips.weights), images, widths=(WIDTH,), most=AT_ONCE)[0]


@jax.jit
def _features(weights: Weights, images: jax.Array) -> tuple[jax.Array]:
    layers = alexnet(weights, images.astype(jnp.float32))
    return (jnp.concatenate([jnp.mean(layer, axis=(1, 2)) for layer in layers], axis=-1),)


def train_head(features: np.ndarray, labels: np.ndarray, num_classes: int) -> Head:
    """Multinomial logistic regression on float32 [N,D] and int [N] in [0,K): one optimum, so no seed.

    Raises:
        UserError: a label is out of range.
    """
    check_labels(labels, num_classes)
    mean = features.mean(axis=0)
    deviation = features.std(axis=0) + 1e-6  # a channel that never fires stays 0
    kernel, bias = _fit(jnp.asarray((features - mean) / deviation), jnp.asarray(labels), num_classes)
    return Head(mean, deviation, np.asarray(kernel), np.asarray(bias))


@functools.partial(jax.jit, static_argnums=2)
def _fit(x: jax.Array, labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel, bias = params
        logits = x @ kernel + bias.reshape(1, -1)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(entropy) + DECAY * jnp.sum(jnp.square(kernel))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_: int, carry: Any) -> Any:
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
    return jax.lax.fori_loop(0, ITERATIONS, step, (params, solver.init(params)))[0]


def save_linear(path: Path, head: Head, *, lpips: Lpips, about: Mapping[str, Any]) -> LinearClassifier:
    """Write the file, whole or not at all, and return what `load` makes of it. `about`: values that JSON takes."""
    arrays = {name: getattr(head, name) for name in ("mean", "deviation", "kernel", "bias")}
    write(path, arrays, file_format=FORMAT, facts={"alexnet": lpips.sha256, "about": dict(about)})
    return load(path)


def load(path: Path) -> LinearClassifier:
    """The classifier in a file of `save_linear`. UserError if there is none, or AlexNet's weights are missing."""
    with readable(path):
        arrays, facts, sha256 = read(path, file_format=FORMAT)
        head = Head(**arrays)
        classes = len(head.bias)
        shapes = [head.mean.shape, head.deviation.shape, head.kernel.shape, head.bias.shape]
        if shapes != [(WIDTH,), (WIDTH,), (WIDTH, classes), (classes,)]:
            raise UserError(f"the weights in {path} are not those of a layer on AlexNet: train it again")
        lpips = load_lpips()
        if facts["alexnet"] != lpips.sha256:
            raise UserError(f"{path} was trained on another AlexNet than the one installed: train it again")
        return LinearClassifier(path.name, sha256, lpips, head, dict(facts["about"]))
