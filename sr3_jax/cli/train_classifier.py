"""Train a small classifier on labelled pictures: what recognition accuracy is measured with.

It takes some minutes on one CPU core. FILE then goes to `sr3 evaluate --classifier FILE`, where --features classifier
compares pictures in its features. Pictures of other sizes than those of the training are resized to them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="labelled pictures of one size: tfds:NAME:SPLIT"
    )
    parser.add_argument("--eval-data", metavar="SOURCE", help="others, on which its accuracy is measured")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="a .safetensors file"
    )
    parser.add_argument("--steps", default="3000", metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--minutes", metavar="M", help="end after M minutes, if the steps take longer")
    parser.add_argument(
        "--batch", default="128", metavar="B", help="pictures in a step (default: %(default)s)"
    )
    parser.add_argument("--width", default="16", metavar="C", help="channels (default: %(default)s)")
    parser.add_argument(
        "--seed", default="0", metavar="S", help="same seed, same weights (default: %(default)s)"
    )
    parser.add_argument(
        "--augment", default="0.5", metavar="X",
        help="how much pictures are moved, turned and zoomed: 0 not at all, 3 much (default: %(default)s)",
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
    from tqdm import tqdm

    from sr3_jax import __version__
    from sr3_jax.aliases import UserError
    from sr3_jax.data.sources import open_source
    from sr3_jax.features.classifier import TrainedClassifier, save_classifier
    from sr3_jax.features.recognition import correct
    from sr3_jax.features.training import Augmentation, Progress, labelled, patch_for, train_classifier
    from sr3_jax.nn.classifier import ClassifierNetwork
    from sr3_jax.signals import leave_if, polled_signals

    steps, batch = _number("--steps", args.steps, int, 1), _number("--batch", args.batch, int, 1)
    width, seed = _number("--width", args.width, int, 4), _number("--seed", args.seed, int, 0)
    minutes = None if args.minutes is None else _number("--minutes", args.minutes, float, 0.01)
    strength = _number("--augment", args.augment, float, 0)
    if args.output.suffix != ".safetensors":
        raise UserError(f"output {args.output} must end in .safetensors")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output} is there already: take another name, or add --overwrite")

    started = time.monotonic()
    images, labels = labelled(open_source(args.data, cache_mb=0))
    held_out = None
    if args.eval_data:
        held_out = labelled(open_source(args.eval_data, cache_mb=0))
    classes = 1 + max(int(part.max()) for part in (labels, *(held_out or ())[1:]))
    if classes < 2:
        raise UserError(f"{args.data} has one class alone: a classifier needs two")
    size = images.shape[1:3]
    network = ClassifierNetwork(classes, width=width, patch=patch_for(*size))
    plain = Augmentation(mirror=not args.no_mirror)
    parts = {name: getattr(plain, name) * strength for name in ("shift", "zoom", "turn", "contrast")}
    with (
        tqdm(total=100.0, disable=None, file=sys.stderr, bar_format="{desc} {bar} {elapsed}") as bar,
        polled_signals() as stopped,
    ):
        mean = {"loss": 0.0, "accuracy": 0.0}
        told = 0.0

        def tell(progress: Progress) -> None:
            nonlocal told
            leave_if(stopped())
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
            steps=steps,
            minutes=minutes,
            batch_size=batch,
            seed=seed,
            augmentation=Augmentation(mirror=plain.mirror, **parts),
            on_step=tell,
        )
    about = {
        "data": args.data,
        "pictures": len(images),
        "eval_data": args.eval_data,
        "steps": steps,
        "minutes": minutes,
        "batch": batch,
        "seed": seed,
        "augment": strength,
        "mirror": plain.mirror,
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "device": jax.devices()[0].device_kind,
    }
    if held_out is not None:
        draft = TrainedClassifier("", "", network, params, *size, {})
        right = correct(draft.logits(held_out[0]), held_out[1])
        by_class = [float(right[held_out[1] == label].mean()) for label in np.unique(held_out[1])]
        about |= {"eval_pictures": len(right), "accuracy": float(right.mean()), "accuracy_by_class": by_class}
    about["seconds"] = round(time.monotonic() - started, 1)
    made = save_classifier(args.output, network, params, size=size, about=about)
    if held_out is not None:
        count, total = int(right.sum()), len(right)
        print(f"{count} of {total} pictures of {args.eval_data} are recognised: {count / total:.2%}")
    print(
        f"{args.output}: {classes} classes, {size[1]}x{size[0]}, {about['seconds']:.0f} s, SHA-256 {made.sha256}"
    )
    return 0


def _number(option: str, text: str, kind: type, least: float):
    from sr3_jax.aliases import UserError

    try:
        value = kind(text)
        if least <= value < float("inf"):
            return value
    except ValueError:
        pass
    what = "a whole number" if kind is int else "a number"
    raise UserError(f"{option} must be {what}, {least:g} or more, got {text!r}")
