"""Score models on held-out images, beside bicubic interpolation: tables, JSON and image grids.

Each image is made small, upscaled by each model with each solver and number of steps, and compared with
the original. DIR gets evaluation.json, .md and .csv, grids with the worst, median and best image, and every
output. The same command again goes on where it was stopped. Exit code 1 if an image could not be used.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sr3_jax.cli._options import listed, whole

if TYPE_CHECKING:
    from sr3_jax.data.sources import Source
    from sr3_jax.features.classifiers import Classifier
    from sr3_jax.inference.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", metavar="PATH_OR_NAME",
        help="a shipped model's name, an exported .safetensors file or a workdir; may be given many times "
        "(default: photo_4x)",
    )  # fmt: skip
    parser.add_argument(
        "--data", default="photos:test", metavar="SOURCE",
        help="photos:test, tfds:NAME[/CONFIG]:SPLIT or folder:PATH (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="DIR", help="the folder for the results"
    )
    parser.add_argument("--steps", metavar="N,N", help="numbers of sampling steps (default: the model's)")
    parser.add_argument("--solver", metavar="NAME,NAME", help="sampling methods (default: the model's)")
    parser.add_argument(
        "--unsearched", action="store_true",
        help="beside a sampler that sr3 search-schedule found also the same solver and steps as they were",
    )  # fmt: skip
    parser.add_argument("--samples", default="1", metavar="N", help="outputs of each image (default: 1)")
    parser.add_argument("--seed", default="0", metavar="S", help="same seed, same outputs (default: 0)")
    parser.add_argument("--limit", metavar="N", help="only the first N images")
    parser.add_argument("--crop", metavar="C", help="only the centre of each image, C x C pixels")
    parser.add_argument(
        "--batch", default="1", metavar="B",
        help="outputs made at once, for many small images of one size (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--no-labels", action="store_true",
        help="draw from models of classes without the labels of the images (they need label_dropout in training)",
    )  # fmt: skip
    parser.add_argument(
        "--classifier", metavar="SPEC",
        help="recognition accuracy by a .safetensors file of sr3 train-classifier, an .onnx file or MODULE:FUNCTION",
    )  # fmt: skip
    parser.add_argument(
        "--features", metavar="NAME",
        help="the network of the Frechet distance and KID: inception:FILE (FID), alexnet, classifier or none "
        "(default: alexnet, if sr3_jax[metrics] is installed)",
    )  # fmt: skip
    parser.add_argument(
        "--patch", metavar="P",
        help="compare features of P x P pixel patches of larger images, not of the whole shrunk (default: the whole)",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="compare with these statistics, not with the originals"
    )
    parser.add_argument(
        "--save-reference", type=Path, metavar="FILE", help="keep the statistics of the originals"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 (3 of several processes) when images were left out."""
    from tqdm import tqdm

    from sr3_jax import files
    from sr3_jax.data.sources import open_source
    from sr3_jax.distributed.processes import start_processes, wait_for_all
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.errors import UserError
    from sr3_jax.evaluation import evaluate, meters, scoring, tables
    from sr3_jax.evaluation import files as evaluation_files
    from sr3_jax.evaluation import parts as evaluation_parts
    from sr3_jax.features.statistics import save_statistics
    from sr3_jax.inference import model

    started = time.perf_counter()
    steps = list(dict.fromkeys(whole("--steps", text) for text in listed("--steps", args.steps)))
    solvers = list(dict.fromkeys(listed("--solver", args.solver)))
    samples, seed = whole("--samples", args.samples), whole("--seed", args.seed, least=0, most=2**32 - 1)
    limit = None if args.limit is None else whole("--limit", args.limit)
    crop = None if args.crop is None else whole("--crop", args.crop)
    batch = whole("--batch", args.batch)
    patch = 0 if args.patch is None else whole("--patch", args.patch, least=31)
    mine, of = start_processes()

    names = list(dict.fromkeys(args.model or ["photo_4x"]))
    loaded = [model.load(name) for name in names]
    scales = list(dict.fromkeys(one.scale for one in loaded))
    least = scoring.least_side(scales)
    if crop is not None and (crop % math.lcm(*scales) or crop < least):
        multiple = math.lcm(*scales)
        raise UserError(f"--crop={crop} must be a multiple of the scale, {multiple}, and at least {least}")
    if args.save_reference and len(scales) > 1:
        raise UserError("--save-reference takes models of one scale: others cut the originals otherwise")
    source = open_source(args.data, min_side=crop or least)
    labelled = _labelled(source)
    setup = meters.open_setup(
        features=args.features,
        classifier=args.classifier,
        labelled=labelled,
        patch=patch,
        reference=args.reference,
        batch=batch,
    )
    told = labelled and not args.no_labels
    _check_classes(source, loaded if told else [], setup.classifier)
    if args.save_reference and setup.meters.network is None:
        raise UserError("--save-reference needs a network: name it with --features")
    labels = evaluate.labels(names)
    methods = [evaluate.original(scale) for scale in scales] if setup.of_originals else []
    methods += [evaluate.bicubic(scale) for scale in scales]
    for one, label in zip(loaded, labels, strict=True):
        methods += evaluate.sampled(
            one, label, solvers=solvers, steps=steps, unsearched=args.unsearched, labelled=told
        )
    folder = files.make_folder(args.output)
    kept = folder / "outputs"

    images = len(range(mine, min(len(source), limit or len(source)), of))
    total = evaluate.count_outputs(methods, images=images, samples=samples)
    with tqdm(total=total, unit="output", disable=None, file=sys.stderr) as bar, stop_signals() as stopped:

        def tell(count: int) -> None:
            bar.update(count)
            exit_if_stopped(stopped())

        part = evaluate.measure_part(
            methods,
            source,
            kept,
            meters=setup.meters,
            environment={"hardware": evaluation_files.hardware()},
            samples=samples,
            seed=seed,
            limit=limit,
            crop=crop,
            batch=batch,
            process=(mine, of),
            on_output=tell,
        )
    parts = [part]
    if of > 1:
        evaluation_parts.write_part(kept, part, process=mine)
        wait_for_all()
        if mine > 0:
            return 0  # the first one speaks for all
        parts = [evaluation_parts.read_part(kept, process=number) for number in range(of)]
    done = evaluate.put_together(
        parts, methods, source.name, kept, meters=setup.meters, reference=setup.reference
    )
    report = evaluation_files.assemble(
        done,
        methods,
        [
            evaluation_files.describe_model(one, label, labelled=told)
            for one, label in zip(loaded, labels, strict=True)
        ],
        source=args.data,
        samples=samples,
        seed=seed,
        crop=crop,
        batch=batch,
        processes=of,
        seconds=time.perf_counter() - started,
        command=["sr3", *sys.argv[1:]],
        **meters.describe(setup, done),
    )
    evaluation_files.write_tables(folder, report)
    grids = evaluation_files.write_grids(folder, done, methods, source, crop=crop)
    if args.save_reference and (how := evaluate.set_meter(kept, setup.meters)):
        save_statistics(args.save_reference, evaluation_parts.reference_of(parts, 0, how))
    for failure in done.failed:
        print(f"left out: {failure}", file=sys.stderr)
    reused = f", {done.reused} outputs were there already" if done.reused else ""
    print(f"\n{tables.markdown(report)}")
    print(f"{', '.join(path.name for path in grids)} and evaluation.json, .md, .csv in {folder}{reused}")
    return (3 if of > 1 else 1) if done.failed else 0


def _check_classes(source: Source, models: list[Model], classifier: Classifier | None) -> None:
    """That they know as many classes as the images have, as far as the data set says it: before hours of sampling."""
    from sr3_jax.errors import UserError

    count = source.num_classes or 0
    for model in models:
        if 0 < model.network.num_classes < count:
            raise UserError(
                f"{source.name} has {count} classes, and model {model.name} knows {model.network.num_classes}: name "
                "images of those, or add --no-labels"
            )
    if classifier is not None and 0 < classifier.num_classes < count:
        raise UserError(
            f"{source.name} has {count} classes, and classifier {classifier.name} knows {classifier.num_classes}: "
            "take one of this data set"
        )


def _labelled(source: Source) -> bool:
    """Whether the images have labels, by the first that can be read."""
    from sr3_jax.image_io.image_file import ImageError

    for index in range(len(source)):
        try:
            return "label" in source[index]
        except ImageError:
            continue
    return False
