"""Training the project's classifier: cross-entropy, AdamW in one cycle, images turned and moved a little.

Shape legend: N images, B batch, H height, W width, K classes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sr3_jax.data.sources import Source
from sr3_jax.errors import UserError
from sr3_jax.features.classifier import check_labels, init_params
from sr3_jax.image_ops import to_unit
from sr3_jax.nn.classifier import ClassifierNetwork
from sr3_jax.types import Key, Params

MOST_BYTES = 4 * 2**30  # of images in memory
SMOOTHING = 0.1  # of the labels
WARM_UP = 0.1  # of the training, in which the learning rate rises; then it falls to 0


@dataclass(frozen=True)
class Augmentation:
    """By how much an image of the training is changed at most, each by its own uniform draw.

    Half of the images stay as they are but for the mirror: an image in a new place is a little blurred, and those
    that the classifier is asked about are not.

    Attributes:
        mirror: left and right are exchanged half of the time.
        shift, zoom: shares of the image's side; turn: degrees; contrast: share of the levels' spread.
    """

    mirror: bool = True
    shift: float = 0.05
    zoom: float = 0.05
    turn: float = 5.0
    contrast: float = 0.1


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `share` of it in [0,1], and the batch's loss and accuracy (before the step)."""

    step: int
    share: float
    loss: float
    accuracy: float


def labelled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """All of a data set in memory: uint8 [N,H,W,3] and labels int32 [N].

    Open it with cache_mb=0. UserError if it has no labels, images of several sizes, or more than 4 GiB of them.
    """
    images, labels = np.zeros((0, 0, 0, 3), np.uint8), np.zeros(len(source), np.int32)
    for index in range(len(source)):
        item = source[index]
        image = item["image"]
        if "label" not in item:
            raise UserError(
                f"{source.name} has no labels: make it of a folder with a subfolder for each class"
            )
        if index == 0:
            if image.nbytes * len(source) > MOST_BYTES:
                raise UserError(
                    f"{source.name} is over 4 GiB of pixels: take a part of it, as in SPLIT[:10000]"
                )
            images = np.zeros((len(source), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (images.shape[1:], image.shape))
            raise UserError(f"{source.name} has images of {sizes}: bring them to one size first")
        images[index], labels[index] = image, item["label"]
    return images, labels


def patch_for(height: int, width: int) -> int:
    """The network's `patch` for images of that size: about 14 to 32 places a side at its first resolution."""
    side = max(height, width)
    return next((patch for most, patch in ((24, 1), (48, 2), (128, 4)) if side <= most), 8)


def augment(key: Key, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """[B,H,W,3] in [-1,1] -> the same, each image changed by itself: bilinear, edges drawn out."""
    b, h, w, _ = images.shape
    draws = jax.random.uniform(key, (7, b, 1, 1), minval=-1.0, maxval=1.0)
    draws = jnp.where(draws[6:] < 0, draws.at[1:].set(0.0), draws)
    sign = jnp.where((draws[0] < 0) & augmentation.mirror, -1.0, 1.0)
    angle = jnp.deg2rad(augmentation.turn) * draws[1]
    scale = 1.0 + augmentation.zoom * draws[2]
    down, right = augmentation.shift * h * draws[3], augmentation.shift * w * draws[4]
    rows = jnp.arange(h, dtype=jnp.float32).reshape(1, h, 1) - (h - 1) / 2
    columns = jnp.arange(w, dtype=jnp.float32).reshape(1, 1, w) - (w - 1) / 2
    sine, cosine = jnp.sin(angle) * scale, jnp.cos(angle) * scale
    y = cosine * rows + sine * columns + (h - 1) / 2 + down
    x = sign * (cosine * columns - sine * rows) + (w - 1) / 2 + right

    def one(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
        def channel(plane: jax.Array) -> jax.Array:
            return jax.scipy.ndimage.map_coordinates(plane, [y, x], order=1, mode="nearest")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, y, x) * (1.0 + augmentation.contrast * draws[5][..., None])


def order(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless [B] numbers below `count`: permutation after permutation, cut into batches."""
    left = np.zeros(0, np.int64)
    epoch = 0
    while True:
        while len(left) < batch_size:
            left = np.concatenate([left, np.random.default_rng([seed, epoch]).permutation(count)])
            epoch += 1
        yield left[:batch_size]
        left = left[batch_size:]


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    network: ClassifierNetwork,
    *,
    steps: int,
    minutes: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.02,
    augmentation: Augmentation = Augmentation(),
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Params:
    """The weights of `network` after training on uint8 [N,H,W,3] with labels int [N] in [0,K).

    Args:
        minutes: end after so many, if `steps` take longer; how far one comes then depends on the machine, otherwise
            the result follows from `seed`.
        learning_rate: at its highest.
        on_step: called after each step.

    Raises:
        UserError: a label is out of range, or the loss is not finite.
    """
    check_labels(labels, network.num_classes)
    key = jax.random.key(seed)
    fresh = jax.jit(functools.partial(init_params, network, images.shape[1:3]))
    params = fresh(jax.random.fold_in(key, 2**31))
    optimizer = _adamw(weight_decay)
    state = optimizer.init(params)
    step = functools.partial(_step, network, optimizer, augmentation)
    started = time.monotonic()
    for number, rows in enumerate(order(len(images), batch_size, seed)):
        spent = 0.0 if minutes is None else (time.monotonic() - started) / (60 * minutes)
        share = max(number / steps, spent)
        if share >= 1:
            return params
        rate = learning_rate * min(max(share, 1 / steps) / WARM_UP, (1 - share) / (1 - WARM_UP))
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        draw = jax.random.fold_in(key, number)
        params, state, loss, correct = step(params, state, draw, images[rows], labels[rows].astype(np.int32))
        if not np.isfinite(loss):
            raise UserError(f"the loss is not finite after {number} steps: use a smaller learning rate")
        on_step(Progress(number + 1, share, float(loss), float(correct)))
    raise AssertionError("the order never ends")


@functools.cache
def _adamw(weight_decay: float) -> optax.GradientTransformation:
    """The same value each time, so that jit compiles once."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=weight_decay)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    network: ClassifierNetwork,
    optimizer: optax.GradientTransformation,
    augmentation: Augmentation,
    params: Params,
    state: optax.OptState,
    key: Key,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    moving, dropping = jax.random.split(key)
    x = augment(moving, to_unit(images), augmentation)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, network.num_classes), SMOOTHING)

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        _, logits = network.apply({"params": params}, x, True, rngs={"dropout": dropping})
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    correct = jnp.mean((logits.argmax(axis=-1) == labels).astype(jnp.float32))
    return optax.apply_updates(params, updates), state, loss, correct
