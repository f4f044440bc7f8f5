"""Train a classifier on labeled images, for `sr3 evaluate --classifier`: a linear probe on AlexNet.

Only the last layer is trained, in seconds, on AlexNet's features of images at their own size, at least 31x31 pixels.
A few dozen images are enough. Requires the weights of LPIPS: pip install -e '.[metrics]'.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sr3_jax.cli._options import local_path

if TYPE_CHECKING:
    import numpy as np

    Labeled = tuple[np.ndarray, np.ndarray]  # images uint8 [N,H,W,3] and labels int32 [N]

# Options of the trainer of small networks, which this command no longer contains.
REMOVED = ("features", "steps", "minutes", "batch", "width", "seed", "augment", "no-mirror")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="labeled images of one size, such as tfds:NAME:SPLIT"
    )
    parser.add_argument("--eval-data", metavar="SOURCE", help="labeled images to measure its accuracy on")
    parser.add_argument(
        "-o", "--output", required=True, type=local_path, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    for name in REMOVED:
        parser.add_argument(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError if no classifier was trained."""
    import platform

    import jax

    from sr3_jax import __version__
    from sr3_jax.errors import UserError
    from sr3_jax.features import linear_probe
    from sr3_jax.features.lpips import load_lpips

    for name in REMOVED:
        if getattr(args, name.replace("-", "_")) is not None:
            raise UserError(
                f"--{name} is not an option of the linear probe, which trains one layer on AlexNet: leave it out, or "
                "train a small network with python -m experiments.train_classifier"
            )
    lpips = load_lpips()
    check_output(args.output, overwrite=args.overwrite)
    started = time.monotonic()
    images, labels, classes, held_out = labeled_pair(args.data, args.eval_data)
    head = linear_probe.train_head(linear_probe.features_of(lpips, images), labels, classes)
    info: dict[str, Any] = {
        "data": args.data,
        "images": len(images),
        "eval_data": args.eval_data,
        "features": "alexnet",
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }
    if held_out is not None:
        info |= accuracy(head.logits(linear_probe.features_of(lpips, held_out[0])), held_out[1])
        print(f"accuracy on {args.eval_data}: {info['accuracy']:.2%} of {info['eval_images']} images")
    seconds = time.monotonic() - started
    saved = linear_probe.save(args.output, head, lpips=lpips, info=info)
    size = f"{images.shape[2]}x{images.shape[1]}"
    print(f"{args.output}: {classes} classes, {size}, {seconds:.0f} s, SHA-256 {saved.sha256}")
    return 0


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise UserError unless a classifier can be written to `path`, before any time is spent on training it."""
    from sr3_jax.errors import UserError
    from sr3_jax.files import make_folder

    if path.suffix != ".safetensors":
        raise UserError(f"output {path} must end in .safetensors")
    if path.is_dir():
        raise UserError(f"output {path} is a folder: give a file")
    if path.exists() and not overwrite:
        raise UserError(f"output {path} already exists: use another name or add --overwrite")
    make_folder(path.parent)


def labeled_pair(data: str, eval_data: str | None) -> tuple[np.ndarray, np.ndarray, int, Labeled | None]:
    """Images and labels to train on, the number of classes, and images and labels to evaluate on, if any.

    Raises:
        UserError: fewer than two classes, or a class to evaluate on that is not trained.
    """
    import numpy as np

    from sr3_jax.data.sources import load_labeled, open_source
    from sr3_jax.errors import UserError
    from sr3_jax.features.classifier_file import check_labels

    images, labels = load_labeled(open_source(data, cache_mb=0))
    known = np.unique(labels)
    if len(known) < 2:
        raise UserError(f"{data} has images of only one class: a classifier needs at least two")
    classes = 1 + int(known[-1])
    check_labels(labels, classes)
    if not eval_data:
        return images, labels, classes, None
    held_out = load_labeled(open_source(eval_data, cache_mb=0))
    unknown = np.setdiff1d(held_out[1], known)
    if len(unknown):
        raise UserError(
            f"{eval_data} has images of class {unknown[0]}, which {data} does not have: use another split"
        )
    return images, labels, classes, held_out


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Top-1 accuracy of logits [N,K] for labels [N], overall and by class, as JSON values."""
    import numpy as np

    from sr3_jax.features.classifiers import correct

    right = correct(logits, labels)
    by_class = {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    return {"eval_images": len(right), "accuracy": float(right.mean()), "accuracy_by_class": by_class}
