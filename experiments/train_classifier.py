"""Train a small classifier from scratch on labeled images of one size.

    python -m experiments.train_classifier --data tfds:fashion_mnist:train --eval-data tfds:fashion_mnist:test \\
        -o fashion_mnist.safetensors

`sr3 evaluate --classifier FILE` measures top-1 and top-5 accuracy with it, and `--features classifier` a Frechet
distance in its features, which is not comparable with published numbers. Images of other sizes are resized to that of
the training. For few images, or classes that differ in texture, use `sr3 train-classifier`, a linear probe on
AlexNet.

Shape legend: N images, B batch, H height, W width, K classes.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from sr3_jax import __version__
from sr3_jax.cli._options import number, whole
from sr3_jax.cli.train_classifier import accuracy, check_output, labeled_pair
from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
from sr3_jax.errors import UserError
from sr3_jax.features.classifier_file import check_labels, write_classifier
from sr3_jax.features.classifiers import NETWORK_FORMAT, NetworkClassifier, init_params, load_network
from sr3_jax.image_ops import to_unit
from sr3_jax.nn.classifier import ClassifierNetwork
from sr3_jax.types import Key, Params

LABEL_SMOOTHING = 0.1
WARMUP = (
    0.1  # fraction of the training in which the learning rate rises linearly; then it falls linearly to 0
)


@dataclass(frozen=True)
class ClassifierAugmentation:
    """The largest changes of a training image, each sampled uniformly and independently.

    Half of the images are only mirrored, since resampling blurs slightly and the evaluated images are not blurred.

    Attributes:
        mirror: flip half of the images horizontally.
        shift, zoom: fractions of the image's side. turn: degrees. contrast: fraction.
    """

    mirror: bool = True
    shift: float = 0.05
    zoom: float = 0.05
    turn: float = 5.0
    contrast: float = 0.1

    def scaled(self, strength: float) -> ClassifierAugmentation:
        """All changes but the mirror multiplied by `strength`."""
        parts = {name: getattr(self, name) * strength for name in ("shift", "zoom", "turn", "contrast")}
        return ClassifierAugmentation(mirror=self.mirror, **parts)


@dataclass(frozen=True)
class Progress:
    """State of a training: the fraction done in [0,1], and loss and accuracy of the last batch before its update."""

    step: int
    fraction: float
    loss: float
    accuracy: float


def patch_for(height: int, width: int) -> int:
    """The network's `patch` for images of this size: the sides of its first resolution are then about 14 to 32."""
    side = max(height, width)
    return next((patch for most, patch in ((24, 1), (48, 2), (128, 4)) if side <= most), 8)


def augment(key: Key, images: jax.Array, augmentation: ClassifierAugmentation) -> jax.Array:
    """[B,H,W,3] in [-1,1] -> the same, each image changed independently: bilinear, with edges extended."""
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
    """Endless batches [B] of indices below `count`: one permutation after another, cut into batches."""
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
    augmentation: ClassifierAugmentation = ClassifierAugmentation(),
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Params:
    """Train `network` on uint8 [N,H,W,3] with labels int [N] in [0,K), by AdamW and cross-entropy.

    Args:
        minutes: stop after this time if `steps` take longer. The result then depends on the machine; otherwise it only
            depends on `seed`.
        learning_rate: the peak of its schedule.
        on_step: called after each step.

    Raises:
        UserError: a label is out of range, or the loss is not finite.
    """
    check_labels(labels, network.num_classes)
    key = jax.random.key(seed)
    initial = jax.jit(functools.partial(init_params, network, images.shape[1:3]))
    params = initial(jax.random.fold_in(key, 2**31))
    optimizer = _adamw(weight_decay)
    state = optimizer.init(params)
    step = functools.partial(_step, network, optimizer, augmentation)
    started = time.monotonic()
    for index, rows in enumerate(order(len(images), batch_size, seed)):
        spent = 0.0 if minutes is None else (time.monotonic() - started) / (60 * minutes)
        fraction = max(index / steps, spent)
        if fraction >= 1:
            break
        rate = learning_rate * min(max(fraction, 1 / steps) / WARMUP, (1 - fraction) / (1 - WARMUP))
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        step_key = jax.random.fold_in(key, index)
        params, state, loss, correct = step(
            params, state, step_key, images[rows], labels[rows].astype(np.int32)
        )
        if not np.isfinite(loss):
            raise UserError(f"the loss is not finite after {index} steps: use a smaller learning rate")
        on_step(Progress(index + 1, fraction, float(loss), float(correct)))
    return params


@functools.cache
def _adamw(weight_decay: float) -> Any:
    """Cached, so that jit compiles the step once."""
    return optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, weight_decay=weight_decay)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    network: ClassifierNetwork,
    optimizer: optax.GradientTransformation,
    augmentation: ClassifierAugmentation,
    params: Params,
    state: optax.OptState,
    key: Key,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Params, optax.OptState, jax.Array, jax.Array]:
    augment_key, dropout_key = jax.random.split(key)
    x = augment(augment_key, to_unit(images), augmentation)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, network.num_classes), LABEL_SMOOTHING)

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        outputs: Any = network.apply({"params": params}, x, True, rngs={"dropout": dropout_key})
        logits = outputs[1]
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    correct = jnp.mean((logits.argmax(axis=-1) == labels).astype(jnp.float32))
    return optax.apply_updates(params, updates), state, loss, correct


def save_classifier(
    path: Path, network: ClassifierNetwork, params: Params, *, size: tuple[int, int], info: Mapping[str, Any]
) -> NetworkClassifier:
    """Write the classifier's file atomically and return the classifier that `load_network` reads from it.

    Args:
        size: (height, width) of the training images.
        info: JSON values that describe the training.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    layers = {name: getattr(network, name) for name in ("num_classes", "width", "patch", "blocks")}
    facts = {"network": layers, "height": size[0], "width": size[1], "about": dict(info)}
    write_classifier(path, arrays, file_format=NETWORK_FORMAT, facts=facts)
    return load_network(path)


# ---- The command.


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with a one-line message for a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="SOURCE", help="labeled images of one size")
    parser.add_argument("--eval-data", metavar="SOURCE", help="labeled images to measure its accuracy on")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument("--steps", default="3000", metavar="N", help="training steps (default: 3000)")
    parser.add_argument("--minutes", metavar="M", help="stop after M minutes if the steps take longer")
    parser.add_argument("--batch", default="128", metavar="B", help="batch size (default: 128)")
    parser.add_argument("--width", default="16", metavar="C", help="channels (default: 16)")
    parser.add_argument("--seed", default="0", metavar="S", help="random seed (default: 0)")
    parser.add_argument(
        "--augment",
        default="0.5",
        metavar="X",
        help="strength of shift, turn, zoom and contrast (default: 0.5)",
    )
    parser.add_argument(
        "--no-mirror", action="store_true", help="do not flip images, as for digits and letters"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except UserError as error:
        print(f"train_classifier: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    settings: dict[str, Any] = {
        "steps": whole("--steps", args.steps),
        "minutes": None if args.minutes is None else _at_least("--minutes", args.minutes, 0.01),
        "batch": whole("--batch", args.batch),
        "width": whole("--width", args.width, least=4),
        "seed": whole("--seed", args.seed, least=0, most=2**32 - 1),
        "augment": _at_least("--augment", args.augment, 0),
        "mirror": not args.no_mirror,
    }
    check_output(args.output, overwrite=args.overwrite)
    started = time.monotonic()
    images, labels, classes, held_out = labeled_pair(args.data, args.eval_data)
    size = images.shape[1:3]
    network = ClassifierNetwork(classes, width=settings["width"], patch=patch_for(*size))
    with (
        tqdm(total=100.0, disable=None, file=sys.stderr, bar_format="{desc} {bar} {elapsed}") as bar,
        stop_signals() as stopped,
    ):

        def show(progress: Progress) -> None:
            exit_if_stopped(stopped(), "Stopped. The classifier was not saved.")
            line = f"step {progress.step}  loss {progress.loss:.3f}  accuracy {progress.accuracy:.1%}"
            bar.set_description_str(line, refresh=False)
            bar.update(100 * progress.fraction - bar.n)
            if bar.disable and progress.step % 500 == 0:  # not a terminal
                print(line, file=sys.stderr, flush=True)

        params = train_classifier(
            images,
            labels,
            network,
            steps=settings["steps"],
            minutes=settings["minutes"],
            batch_size=settings["batch"],
            seed=settings["seed"],
            augmentation=ClassifierAugmentation(mirror=settings["mirror"]).scaled(settings["augment"]),
            on_step=show,
        )
    info = {
        "data": args.data,
        "images": len(images),
        "eval_data": args.eval_data,
        **settings,
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }
    if held_out is not None:
        classifier = NetworkClassifier("", "", network, params, size[0], size[1], {})
        info |= accuracy(classifier.logits(held_out[0]), held_out[1])
        print(f"accuracy on {args.eval_data}: {info['accuracy']:.2%} of {info['eval_images']} images")
    seconds = time.monotonic() - started
    saved = save_classifier(args.output, network, params, size=size, info=info)
    print(f"{args.output}: {classes} classes, {size[1]}x{size[0]}, {seconds:.0f} s, SHA-256 {saved.sha256}")


def _at_least(option: str, text: str, least: float) -> float:
    value = number(option, text)
    if not least <= value < float("inf"):
        raise UserError(f"{option} must be a number, {least:g} or more, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
