"""Evaluate models and other programs' outputs, next to bicubic interpolation: tables, JSON and image grids.

Each image is downsampled, upscaled by each model with each solver and number of steps, and compared with the ground
truth. DIR gets evaluation.json, .md and .csv, grids of the worst, median and best image, and every output. The same
command continues an interrupted evaluation. The exit code is 1 if an image could not be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sr3_jax.cli._options import any_path, class_label, count, counts, local_path, names, seed
from sr3_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", metavar="PATH_OR_NAME",
        help="shipped model, exported .safetensors file or workdir; repeat to compare models "
        "(default: photo_4x, unless there are --outputs)",
    )  # fmt: skip
    parser.add_argument(
        "--outputs", action="append", default=[], type=_named_folder, metavar="NAME=FOLDER",
        help="also score these images, made by another program and named as those of --data; repeat for more programs",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=count, metavar="N",
        help="of --outputs (default: that of the models or pairs, else 4)",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="SOURCE",
        help="photos:test, tfds:NAME[/CONFIG]:SPLIT, folder:PATH or pairs:LR_DIR:HR_DIR (default: photos:test; without "
        "it, --outputs and --reference compare whole sets of images, which need no ground truth)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, type=any_path, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--steps", type=counts, default=[], metavar="N,N", help="sampling steps (default: the model's)"
    )
    parser.add_argument(
        "--solver", type=names, default=[], metavar="NAME,NAME", help="solvers (default: the model's)"
    )
    parser.add_argument(
        "--unsearched", action="store_true",
        help="if sr3 search-schedule found the model's sampler, also evaluate its solver and steps without it",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=count, default=1, metavar="N", help="outputs per image (default: 1)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N images")
    parser.add_argument("--crop", type=count, metavar="C", help="only the center of each image, C x C pixels")
    parser.add_argument(
        "--degradation", default="clean", metavar="NAME",
        help="how low-res images are made: clean (bicubic), photo (blur, noise, JPEG) or wild (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", "--batch", type=count, default=1, metavar="B",
        help="outputs sampled at once, for many small images of one size (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--label", type=class_label, metavar="N",
        help="class of the images, for class-conditional models and images without labels",
    )  # fmt: skip
    parser.add_argument(
        "--no-labels", action="store_true",
        help="sample class-conditional models without the labels of the images (needs label_dropout in training)",
    )  # fmt: skip
    parser.add_argument(
        "--classifier", metavar="SPEC",
        help="add accuracy by a .safetensors file of sr3 train-classifier, an .onnx file or MODULE:FUNCTION",
    )  # fmt: skip
    parser.add_argument(
        "--features", metavar="NAME",
        help="network of the Frechet distance and KID: inception:FILE (FID), alexnet, classifier or none "
        "(default: alexnet, if its weights are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--patch", type=count, default=0, metavar="P",
        help="compare features of patches of P x P pixels instead of downsampled whole images",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=local_path, metavar="SOURCE_OR_FILE",
        help="features of the set are compared with those of these images (folder:PATH or another SOURCE), or with a "
        "file of --save-reference, instead of those of the ground truth",
    )  # fmt: skip
    parser.add_argument(
        "--save-reference", type=local_path, metavar="FILE", help="write the statistics of the ground truth"
    )


# Options that have an effect on models only, and with ground truth only, with their defaults.
_OF_MODELS: Mapping[str, Any] = {
    "steps": [], "solver": [], "unsearched": False, "samples": 1, "seed": 0, "label": None, "no_labels": False,
}  # fmt: skip
_OF_GROUND_TRUTH: Mapping[str, Any] = {
    "scale": None, "crop": None, "degradation": "clean", "batch_size": 1, "save_reference": None,
}  # fmt: skip


def _refuse(args: argparse.Namespace, options: Mapping[str, Any], needed: str) -> None:
    """UserError if an option is given that would have no effect."""
    for name, default in options.items():
        if (value := getattr(args, name)) != default:
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            raise UserError(f"--{name.replace('_', '-')}={shown} has no effect without {needed}: omit it")


def _run_sets(args: argparse.Namespace) -> int:
    """Compare folders of images with a reference, without ground truth."""
    from sr3_jax.cli._progress import progress_bar
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.evaluation import evaluate_sets
    from sr3_jax.evaluation.results import markdown

    with progress_bar(unit="image") as bar, stop_signals("this image") as stopped:

        def progress() -> None:
            bar.update()
            exit_if_stopped(stopped())

        report, files = evaluate_sets(
            _by_name(args.outputs),
            args.reference,
            args.output,
            features=args.features,
            classifier=args.classifier,
            patch=args.patch,
            limit=args.limit,
            command=["sr3", *sys.argv[1:]],
            on_image=progress,
        )
    print(f"\n{markdown(report)}")
    print(f"wrote {', '.join(path.name for path in files)} in {args.output}")
    return 0


def _named_folder(text: str) -> tuple[str, str]:
    """'NAME=FOLDER' as (name, folder)."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, got {text!r}")
    return name, folder


def _by_name(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    names = [name for name, _ in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--outputs has two folders named {twice}: give each program its own name")
    return dict(given)


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 (3 with several processes) if images could not be used."""
    from sr3_jax.cli._progress import progress_bar, step_reports
    from sr3_jax.distributed.processes import start_processes
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.evaluation import evaluate

    if args.model is None and args.outputs:
        _refuse(args, _OF_MODELS, "--model")
        if args.data is None and args.reference:
            _refuse(args, _OF_GROUND_TRUTH, "--data")
            return _run_sets(args)
    process = start_processes()
    with progress_bar(unit="output") as bar, stop_signals("this batch") as stopped:

        def progress(finished: int, total: int) -> None:
            bar.total = total
            bar.update(finished)
            exit_if_stopped(stopped())

        done = evaluate(
            list(dict.fromkeys(args.model or ([] if args.outputs else ["photo_4x"]))),
            args.data or "photos:test",
            args.output,
            steps=args.steps,
            solvers=args.solver,
            samples=args.samples,
            seed=args.seed,
            batch_size=args.batch_size,
            limit=args.limit,
            crop=args.crop,
            degradation=args.degradation,
            outputs=_by_name(args.outputs),
            scale=args.scale,
            unsearched=args.unsearched,
            use_labels=not args.no_labels,
            label=args.label,
            classifier=args.classifier,
            features=args.features,
            patch=args.patch,
            reference=args.reference,
            save_reference=args.save_reference,
            command=["sr3", *sys.argv[1:]],
            process=process,
            on_output=progress,
            on_step=step_reports(bar),
        )
    if done is None:
        return 0  # process 0 reports for all
    for failure in done.failed:
        print(f"skipped: {failure}", file=sys.stderr)
    reused = f" ({done.reused} outputs were cached)" if done.reused else ""
    print(f"\n{done.markdown()}")
    print(f"wrote {', '.join(path.name for path in done.files)} in {args.output}{reused}")
    return (3 if process[1] > 1 else 1) if done.failed else 0
