"""Score models on held-out pictures, beside bicubic interpolation: tables, JSON and picture grids.

Each picture is made small, upscaled by each model with each solver and number of steps, and compared with
the original. DIR gets evaluation.json, .md and .csv, grids with the worst, median and best picture, and every
output. The same command again goes on where it was stopped. Exit code 1 if a picture could not be used.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path


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
    parser.add_argument("--samples", default="1", metavar="N", help="outputs of each picture (default: 1)")
    parser.add_argument("--seed", default="0", metavar="S", help="same seed, same outputs (default: 0)")
    parser.add_argument("--limit", metavar="N", help="only the first N pictures")
    parser.add_argument("--crop", metavar="C", help="only the centre of each picture, C x C pixels")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 1 when pictures were left out."""
    from tqdm import tqdm

    from sr3_jax import evaluate, evaluation_files, model, outputs, scoring, tables
    from sr3_jax.aliases import UserError
    from sr3_jax.data.sources import open_source
    from sr3_jax.signals import leave_if, polled_signals

    started = time.perf_counter()
    steps = [_whole("--steps", text) for text in _listed("--steps", args.steps)]
    solvers = _listed("--solver", args.solver)
    samples, seed = _whole("--samples", args.samples), _whole("--seed", args.seed, least=0, most=2**32 - 1)
    limit = None if args.limit is None else _whole("--limit", args.limit)
    crop = None if args.crop is None else _whole("--crop", args.crop)

    names = list(dict.fromkeys(args.model or ["photo_4x"]))
    loaded = [model.load(name) for name in names]
    scales = list(dict.fromkeys(one.scale for one in loaded))
    least = scoring.least_side(scales)
    if crop is not None and (crop % math.lcm(*scales) or crop < least):
        multiple = math.lcm(*scales)
        raise UserError(f"--crop={crop} must be a multiple of the scale, {multiple}, and at least {least}")
    labels = evaluate.labels(names)
    methods = [evaluate.bicubic(scale) for scale in scales]
    for one, label in zip(loaded, labels, strict=True):
        methods += evaluate.sampled(one, label, solvers=solvers, steps=steps)
    source = open_source(args.data, min_side=crop or least)
    folder = outputs.open_folder(args.output)

    pictures = min(len(source), limit or len(source))
    total = evaluate.count_outputs(methods, pictures=pictures, samples=samples)
    with tqdm(total=total, unit="output", disable=None, file=sys.stderr) as bar, polled_signals() as stopped:

        def tell() -> None:
            bar.update()
            leave_if(stopped())

        done = evaluate.evaluate(
            methods,
            source,
            folder / "outputs",
            environment={"hardware": evaluation_files.hardware()},
            samples=samples,
            seed=seed,
            limit=limit,
            crop=crop,
            on_output=tell,
        )
    report = evaluation_files.assemble(
        done,
        methods,
        [evaluation_files.describe_model(one, label) for one, label in zip(loaded, labels, strict=True)],
        source=args.data,
        samples=samples,
        seed=seed,
        crop=crop,
        seconds=time.perf_counter() - started,
        command=["sr3", *sys.argv[1:]],
    )
    evaluation_files.write_tables(folder, report)
    grids = evaluation_files.write_grids(folder, done, methods, source, crop=crop)
    for failure in done.failed:
        print(f"left out: {failure}", file=sys.stderr)
    reused = f", {done.reused} outputs were there already" if done.reused else ""
    print(f"\n{tables.markdown(report)}")
    print(f"{', '.join(path.name for path in grids)} and evaluation.json, .md, .csv in {folder}{reused}")
    return 1 if done.failed else 0


def _listed(option: str, text: str | None) -> list[str]:
    """The parts of a list with commas, each once; none if the option was not given."""
    from sr3_jax.aliases import UserError

    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option}={text!r} has an empty part: write it as A,B,C")
    return list(dict.fromkeys(parts))


def _whole(option: str, text: str, *, least: int = 1, most: int = 10**9) -> int:
    from sr3_jax.aliases import UserError

    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        above = f"{least} or more" if most == 10**9 else f"{least} to {most}"
        raise UserError(f"{option} must be a whole number, {above}, got {text!r}")
    return int(text)
