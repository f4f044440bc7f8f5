"""Shared by `sr3 cascade` and `sr3 generate`: their options, and the run itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sr3_jax.cli._options import by_stage, listed, local_path, number, whole

if TYPE_CHECKING:
    from sr3_jax.inference.stages import StageInfo
    from sr3_jax.sampling import Sampling

MANIFEST = "images.json"


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add the options of both commands."""
    parser.add_argument("-n", "--count", metavar="N", help="number of images (default: 16)")
    parser.add_argument(
        "--labels", metavar="L,L",
        help="class labels, repeated in order, or 'none' (default: all classes of the model, if it has any)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=local_path, metavar="OUT", help="output folder")
    parser.add_argument(
        "--steps",
        metavar="N,N",
        help="sampling steps, for all stages or one number per stage (default: each model's own)",
    )
    parser.add_argument(
        "--solver",
        metavar="NAME,NAME",
        help="solvers: ancestral, ddpm, ddim, dpmpp_2m, heun or MODULE:FUNCTION (default: each model's own)",
    )
    parser.add_argument(
        "--guidance",
        metavar="G,G",
        help="weight of classifier-free guidance; 1 for none (default: each model's own)",
    )
    parser.add_argument(
        "--augment",
        metavar="A,A",
        help="strength of the conditioning augmentation, 0 to 1 (default: each model's own)",
    )
    parser.add_argument(
        "--seed", default="0", metavar="S", help="the same seed gives the same images (default: 0)"
    )
    parser.add_argument(
        "--batch-size", metavar="B", help="images per batch (default: 64, fewer if they are large)"
    )
    parser.add_argument("--unfinished", action="store_true", help="allow stages that are still in training")


def generate_images(
    args: argparse.Namespace, paths: list[str], low_res: list[Path] | None, *, keep: bool
) -> int:
    """Generate images with the stages at these paths and write the contact sheets; exit code 0."""
    from sr3_jax import files
    from sr3_jax.cli._progress import progress_bar, step_reports
    from sr3_jax.distributed.processes import start_processes, wait_for_all
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.errors import UserError
    from sr3_jax.inference import cascade, contact_sheet, stages

    stage_list = stages.find_stages(paths)
    starts = _read(low_res, args.output) if low_res else None
    sizes = [image.shape[:2] for image in starts or ()]
    stages.check_chain(stage_list, low_res=sizes, unfinished=args.unfinished)
    count = (16 if starts is None else len(starts)) if args.count is None else whole("--count", args.count)
    if starts is not None and count > len(starts):
        raise UserError(f"--count={count} is more than the {len(starts)} images of --low-res: omit --count")
    job = cascade.CascadeJob(
        stages=tuple(stage_list),
        samplings=tuple(_settings(args, stage_list)),
        count=count,
        labels=_labels(args.labels, stage_list, count),
        low_res=None if starts is None else tuple(starts[:count]),
        seed=whole("--seed", args.seed, least=0, most=2**32 - 1),
        batch_size=None if args.batch_size is None else whole("--batch-size", args.batch_size),
    )
    folder = files.make_folder(args.output)
    process = start_processes()
    steps = cascade.prepare(job, processes=process[1])
    total = len(range(process[0], count, process[1])) * len(stage_list)
    with progress_bar(total=total, unit="image") as bar, stop_signals("this batch") as stopped:

        def advance(done: int) -> None:
            bar.update(done)
            exit_if_stopped(stopped())

        cascade.generate(
            job,
            steps,
            folder,
            process=process,
            on_stage=bar.set_description,
            on_images=advance,
            on_step=step_reports(bar),
        )
    wait_for_all()
    if process[0] == 0:
        names = contact_sheet.write(job, folder)
        labels = [None] * count if job.labels is None else job.labels.tolist()
        manifest: dict[str, Any] = {
            "command": ["sr3", *sys.argv[1:]],
            "seed": job.seed,
            "stages": [
                {
                    "name": step.stage.name,
                    "path": step.stage.path,
                    "weights": step.weights,
                    "sampling": dataclasses.asdict(step.sampling),
                }
                for step in steps
            ],
            "images": [{"file": f"{index:05d}.png", "label": label} for index, label in enumerate(labels)],
        }
        _remove_older(folder, {entry["file"] for entry in manifest["images"]})
        files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if not keep:
            cascade.remove_intermediate(job, folder)
        print(f"wrote {count} images, {', '.join(names)} and {MANIFEST} to {folder}")
    return 0


def _settings(
    args: argparse.Namespace, stage_list: Sequence[StageInfo]
) -> list[Callable[[Sampling], Sampling]]:
    """For each stage, a function that replaces the requested ones of its default sampling settings."""
    count, every = len(stage_list), [True] * len(stage_list)
    guided, augmented = [one.guided for one in stage_list], [one.augmented for one in stage_list]
    steps = by_stage("--steps", args.steps, stages=count, read=whole, takes=every)
    solvers = by_stage("--solver", args.solver, stages=count, read=lambda _, text: text, takes=every)
    guidance = by_stage("--guidance", args.guidance, stages=count, read=number, takes=guided)
    augment = by_stage("--augment", args.augment, stages=count, read=number, takes=augmented)

    def setting(index: int) -> Callable[[Sampling], Sampling]:
        def settings(own: Sampling) -> Sampling:
            weight, strength = guidance[index], augment[index]
            return dataclasses.replace(
                own.override(steps=steps[index], solver=solvers[index]),
                guidance=own.guidance if weight is None else weight,
                augment=own.augment if strength is None else strength,
            )

        return settings

    return [setting(index) for index in range(count)]


def _labels(text: str | None, stage_list: list[Any], count: int) -> Any:
    import numpy as np

    from sr3_jax.errors import UserError

    classes = max(stage.classes for stage in stage_list)
    if text == "none" or (text is None and not classes):
        return None
    if not classes:
        raise UserError(f"--labels={text}: no stage was trained with labels: omit it")
    given = listed("--labels", text) if text is not None else [str(label) for label in range(classes)]
    labels = [whole("--labels", label, least=0, most=classes - 1) for label in given]
    return np.resize(np.array(labels, np.int32), count)


def _remove_older(folder: Path, files: set[str]) -> None:
    """Remove the images that the manifest of an earlier run names and this run does not have."""
    from sr3_jax.files import read_json

    try:
        before = [entry["file"] for entry in read_json(folder / MANIFEST)["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for file in before:
        if file not in files and Path(file).name == file:
            (folder / file).unlink(missing_ok=True)


def _read(paths: list[Path], output: Path) -> list[Any]:
    """The images of files and folders, except those in the output folder."""
    from sr3_jax.errors import UserError
    from sr3_jax.image_io.errors import printable
    from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, ImageError, read_rgb
    from sr3_jax.image_io.inputs import walk

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found, failed = walk(path, exclude=output)
        if failed:
            folder, reason = failed[0]
            raise UserError(f"{printable(folder)} cannot be listed ({reason}): change its permissions")
        files += [file for file in sorted(found, key=os.fsencode) if file.suffix.lower() in IMAGE_SUFFIXES]
    images = []
    for file in files:
        try:
            images.append(read_rgb(file))
        except ImageError as error:
            raise UserError(f"{printable(file)} {error}") from error
    if not images:
        raise UserError(f"no images in {', '.join(printable(path) for path in paths)}: name other files")
    return images
