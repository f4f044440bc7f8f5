"""Upscale image files and folders of images.

The structure of a folder is kept under OUT. Existing outputs are skipped, so the same command resumes an interrupted
run. Exit code 1 (3 with several processes) if an image failed; each failure is listed with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from sr3_jax.cli._options import any_path, class_label, count, percent, positive, seed
from sr3_jax.image_io.errors import printable
from sr3_jax.image_io.image_file import OUTPUT_FORMATS

_NAMED = 5  # skipped files in the summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="*", type=any_path, metavar="INPUT", help="an image file or a folder")
    parser.add_argument(
        "-i", "--input", nargs="+", action="extend", default=[], type=any_path, dest="more_inputs",
        metavar="INPUT", help="the same as INPUT by itself",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, type=any_path, metavar="OUT",
        help="output folder; for a single image also the output file",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="photo_4x", metavar="PATH_OR_NAME",
        help="a shipped model's name, a .safetensors file or a workdir (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--steps", type=count, metavar="N", help="sampling steps (default: the model's own)")
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help="ancestral, ddpm, ddim, dpmpp_2m, heun or MODULE:FUNCTION (default: the model's own)",
    )
    parser.add_argument(
        "--label", type=class_label, metavar="N", help="class of the images, for class-conditional models"
    )
    parser.add_argument(
        "--denoise", type=float, metavar="T",
        help="0 to 1: larger trusts the input less and removes more noise and JPEG blocks; for models trained with "
        "config.model.augment (default: the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--outscale", type=positive, metavar="X",
        help="enlarge by X instead of the model's scale, such as 2, 3, 8 or 1.5: the model is applied as often as "
        "needed, then a Lanczos filter shrinks the result",
    )  # fmt: skip
    parser.add_argument(
        "--tile", type=count, metavar="N",
        help="maximum side of a tile in pixels of the input, for less memory (default: 1024 / scale)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"),
        help="type of activations; bfloat16 is faster on accelerators, with small differences (default: the model's)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "gpu", "tpu"), help="where to compute (default: the best one present)"
    )
    parser.add_argument(
        "--format", choices=OUTPUT_FORMATS, help="file format of the outputs (default: that of each input)"
    )
    parser.add_argument(
        "--quality", type=percent, metavar="Q",
        help="1 to 100, of JPEG and WebP outputs (default: JPEG at 95, WebP lossless)",
    )  # fmt: skip
    parser.add_argument(
        "--suffix",
        default="",
        metavar="TEXT",
        help="append to the names of outputs: _4x makes a.png a_4x.png",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="S", help="the same seed gives the same output (default: 0)"
    )
    parser.add_argument(
        "--batch-size", type=count, default=None, metavar="B",
        help="images or tiles per batch, divided among the devices (default: the number of devices)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing outputs")
    parser.add_argument(
        "--max-megapixels", type=positive, default=64.0, metavar="N",
        help="skip images above N megapixels (default: 64)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sr3_jax.cli._progress import Pace, progress_bar, step_reports
    from sr3_jax.distributed.processes import start_processes
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.errors import UserError
    from sr3_jax.inference.upscale_files import Job, UpscaleResult, find_images, split_finished, upscale_files

    if args.device:
        import jax

        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(args.device, args.device))
    inputs = args.inputs + args.more_inputs
    if args.quality is not None and args.format in ("png", "tif"):
        raise UserError(
            f"--quality={args.quality} has no effect on --format={args.format}: use --format jpg or webp"
        )
    found = find_images(inputs, args.output, file_format=args.format, suffix=args.suffix)
    if not found.jobs and not found.failed:
        raise UserError(f"no images in {', '.join(printable(path) for path in inputs)}: name other inputs")
    mine, of = start_processes()
    jobs, unusable = found.jobs[mine::of], found.failed[mine::of]  # all processes see the same list
    for path, failure in unusable:
        print(f"{printable(path)}: {failure}", file=sys.stderr)
    to_do, finished = split_finished(jobs, overwrite=args.overwrite)
    result = UpscaleResult((), tuple(job.target for job in finished), (), ())
    if to_do:  # otherwise there is no need to load the model
        import jax

        from sr3_jax.inference import loading

        model = loading.load(args.model)
        if args.dtype:
            model = model.with_dtype(args.dtype)
        if args.label is not None:
            model = dataclasses.replace(model, label=args.label)
        sampling = model.sampling.override(steps=args.steps, solver=args.solver)
        if args.denoise is not None:
            sampling = dataclasses.replace(sampling, augment=args.denoise)
        batch_size = args.batch_size or jax.local_device_count()
        with (
            progress_bar(total=len(to_do), unit="image") as bar,
            stop_signals("this image") as stopped,
        ):

            def start(group: Sequence[Job]) -> None:
                bar.working_on(_summary([Path(job.source.name) for job in group]))

            def report(job: Job, failure: str | None) -> None:
                if failure is not None:
                    tqdm.write(f"{printable(job.source)}: {failure}", file=sys.stderr)
                bar.update()
                exit_if_stopped(stopped())

            def report_tiles(job: Job, done: int, of: int) -> None:
                name, left = printable(job.source.name), pace.left(done, of)
                if left and pace.is_known and not announced:  # also where the bar is cut off or not shown
                    announced.add(name)
                    tqdm.write(f"{name}: {of} tiles, {left} at the pace of the first ones", file=sys.stderr)
                bar.working_on(name, f"tile {done} of {of}{left and f', {left}'}")
                exit_if_stopped(stopped())

            pace, announced = Pace(), set[str]()

            result = upscale_files(
                model.watched(step_reports(bar)),
                jobs,
                sampling=sampling,
                seed=args.seed,
                batch_size=batch_size,
                tile=args.tile,
                outscale=args.outscale,
                quality=args.quality,
                overwrite=args.overwrite,
                max_megapixels=args.max_megapixels,
                on_start=start,
                on_result=report,
                on_tiles=report_tiles,
            )
    for note, paths in _grouped(result.notes).items():
        print(f"note: {_summary(paths)}: {note}")
    if result.not_kept:
        names = ", ".join(f"{name} ({_summary(paths)})" for name, paths in _grouped(result.not_kept).items())
        print(f"note: not kept, too large or impossible in the output format: {names}", file=sys.stderr)
    if found.ignored and mine == 0:
        names = ", ".join(printable(path.name) for path in found.ignored[:_NAMED])
        more = ", ..." if len(found.ignored) > _NAMED else ""
        print(f"skipped {len(found.ignored)} non-image files: {names}{more}")
    failed = len(result.failed) + len(unusable)
    who = f"process {mine} of {of}: " if of > 1 else ""
    print(f"{who}{len(result.done)} done, {len(result.skipped)} skipped (output exists), {failed} failed")
    return (3 if of > 1 else 1) if failed else 0


def _grouped(texts: Iterable[tuple[Path, tuple[str, ...]]]) -> dict[str, list[Path]]:
    """The paths of each text."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, found in texts:
        for text in dict.fromkeys(found):
            groups[text].append(path)
    return groups


def _summary(paths: Sequence[Path]) -> str:
    return printable(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
