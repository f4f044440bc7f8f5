"""Train a small classifier on labelled images: what recognition accuracy is measured with.

It takes some minutes on one CPU core. FILE then goes to `sr3 evaluate --classifier FILE`, where --features classifier
compares images in its features. Images of other sizes than those of the training are resized to them.

With --features alexnet only a last layer is trained, to its optimum, on what AlexNet sees in images at their own
size, 31 pixels a side at least: for few images, and for classes that differ in texture. The options of a training
are refused then, and the file does not serve `sr3 evaluate --features classifier`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sr3_jax.cli._options import number, whole

if TYPE_CHECKING:
    import numpy as np

    from sr3_jax.features.lpips import Lpips

    # Images to logits; and path and facts to the SHA-256 of the file that is written.
    Trained = tuple[Callable[[np.ndarray], np.ndarray], Callable[[Path, dict[str, Any]], str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="labelled images of one size: tfds:NAME:SPLIT"
    )
    parser.add_argument("--eval-data", metavar="SOURCE", help="others, on which its accuracy is measured")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument(
        "--features", metavar="NAME",
        help="alexnet: a linear layer on that network, whose weights are of sr3_jax[metrics] (default: a network of "
        "its own)",
    )  # fmt: skip
    parser.add_argument("--steps", metavar="N", help="of training (default: 3000)")
    parser.add_argument("--minutes", metavar="M", help="end after M minutes, if the steps take longer")
    parser.add_argument("--batch", metavar="B", help="images in a step (default: 128)")
    parser.add_argument("--width", metavar="C", help="channels (default: 16)")
    parser.add_argument("--seed", metavar="S", help="same seed, same weights (default: 0)")
    parser.add_argument(
        "--augment", metavar="X",
        help="how much images are moved, turned and zoomed: 0 not at all, 3 much (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--no-mirror", action="store_true", help="where left and right matter, as in digits and letters"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError when nothing could be done."""
    import platform

    import jax
    import numpy as np

    from sr3_jax import __version__
    from sr3_jax.data.sources import open_source
    from sr3_jax.errors import UserError
    from sr3_jax.features.classifier import check_labels
    from sr3_jax.features.lpips import load_lpips
    from sr3_jax.features.recognition import correct
    from sr3_jax.features.training import labelled
    from sr3_jax.files import make_folder

    if args.features not in (None, "alexnet"):
        raise UserError(f"--features must be alexnet or left out, got {args.features!r}")
    settings = _no_settings(args) if args.features else _settings(args)
    lpips = load_lpips() if args.features else None
    if args.output.suffix != ".safetensors":
        raise UserError(f"output {args.output} must end in .safetensors")
    if args.output.is_dir():
        raise UserError(f"output {args.output} is a folder: name a file")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already: take another name, or add --overwrite")

    make_folder(args.output.parent)  # now rather than after the training

    started = time.monotonic()
    images, labels = labelled(open_source(args.data, cache_mb=0))
    known, held_out = np.unique(labels), None
    if len(known) < 2:
        raise UserError(f"{args.data} has images of one class alone: a classifier needs two")
    classes = 1 + int(known[-1])
    check_labels(labels, classes)
    if args.eval_data:
        held_out = labelled(open_source(args.eval_data, cache_mb=0))
        unknown = np.setdiff1d(held_out[1], known)
        if len(unknown):
            raise UserError(
                f"{args.eval_data} has images of class {unknown[0]}, which {args.data} has not: name others"
            )
    if lpips is not None:
        logits, save = _linear(images, labels, classes, lpips)
    else:
        logits, save = _network(images, labels, classes, settings)
    about = {
        "data": args.data,
        "images": len(images),
        "eval_data": args.eval_data,
        **settings,
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }
    if held_out is not None:
        right = correct(logits(held_out[0]), held_out[1])
        by_class = {int(label): float(right[held_out[1] == label].mean()) for label in np.unique(held_out[1])}
        about |= {"eval_images": len(right), "accuracy": float(right.mean()), "accuracy_by_class": by_class}
    seconds = time.monotonic() - started
    sha256 = save(args.output, about)
    if held_out is not None:
        count, total = int(right.sum()), len(right)
        print(f"{count} of {total} images of {args.eval_data} are recognised: {count / total:.2%}")
    size = f"{images.shape[2]}x{images.shape[1]}"
    print(f"{args.output}: {classes} classes, {size}, {seconds:.0f} s, SHA-256 {sha256}")
    return 0


def _linear(images: np.ndarray, labels: np.ndarray, classes: int, lpips: Lpips) -> Trained:
    """A layer on AlexNet."""
    from sr3_jax.features.linear_probe import features_of, save_linear, train_head

    head = train_head(features_of(lpips, images), labels, classes)
    return (
        lambda images: head.logits(features_of(lpips, images)),
        lambda path, about: save_linear(path, head, lpips=lpips, about=about).sha256,
    )


def _network(images: np.ndarray, labels: np.ndarray, classes: int, settings: dict[str, Any]) -> Trained:
    """A small network, with a bar that tells how far it is."""
    from tqdm import tqdm

    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.features.classifier import TrainedClassifier, save_classifier
    from sr3_jax.features.training import Augmentation, Progress, patch_for, train_classifier
    from sr3_jax.nn.classifier import ClassifierNetwork

    size = images.shape[1:3]
    network = ClassifierNetwork(classes, width=settings["width"], patch=patch_for(*size))
    plain = Augmentation(mirror=settings["mirror"])
    strength = settings["augment"]
    parts = {name: getattr(plain, name) * strength for name in ("shift", "zoom", "turn", "contrast")}
    with (
        tqdm(total=100.0, disable=None, file=sys.stderr, bar_format="{desc} {bar} {elapsed}") as bar,
        stop_signals() as stopped,
    ):
        mean = {"loss": 0.0, "accuracy": 0.0}
        told = 0.0

        def tell(progress: Progress) -> None:
            nonlocal told
            exit_if_stopped(stopped(), "Stopped: nothing is kept of a classifier's training.")
            for name in mean:  # over about the last 50 steps
                mean[name] += (getattr(progress, name) - mean[name]) / min(progress.step, 50)
            line = f"step {progress.step}  loss {mean['loss']:.3f}  accuracy {mean['accuracy']:.1%}"
            bar.set_description_str(line, refresh=False)
            bar.update(100 * progress.share - bar.n)
            if bar.disable and time.monotonic() - told > 30:  # no terminal: a line now and then
                told = time.monotonic()
                print(line, file=sys.stderr, flush=True)

        params = train_classifier(
            images,
            labels,
            network,
            steps=settings["steps"],
            minutes=settings["minutes"],
            batch_size=settings["batch"],
            seed=settings["seed"],
            augmentation=Augmentation(mirror=plain.mirror, **parts),
            on_step=tell,
        )
    draft = TrainedClassifier("", "", network, params, *size, {})
    return (
        draft.logits,
        lambda path, about: save_classifier(path, network, params, size=size, about=about).sha256,
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    def given(name: str, usual: str) -> tuple[str, str]:
        text = getattr(args, name)
        return f"--{name}", usual if text is None else text

    return {
        "steps": whole(*given("steps", "3000")),
        "minutes": None if args.minutes is None else _least("--minutes", args.minutes, 0.01),
        "batch": whole(*given("batch", "128")),
        "width": whole(*given("width", "16"), least=4),
        "seed": whole(*given("seed", "0"), least=0, most=2**32 - 1),
        "augment": _least(*given("augment", "0.5"), 0),
        "mirror": not args.no_mirror,
    }


def _no_settings(args: argparse.Namespace) -> dict[str, Any]:
    from sr3_jax.errors import UserError

    given = [
        name
        for name in ("steps", "minutes", "batch", "width", "seed", "augment")
        if getattr(args, name) is not None
    ]
    given += ["no-mirror"] if args.no_mirror else []
    if given:
        raise UserError(f"--features=alexnet trains one layer to its optimum: leave out --{given[0]}")
    return {"features": args.features}


def _least(option: str, text: str, least: float) -> float:
    from sr3_jax.errors import UserError

    value = number(option, text)
    if not least <= value < float("inf"):
        raise UserError(f"{option} must be a number, {least:g} or more, got {text!r}")
    return value
