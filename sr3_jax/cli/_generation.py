"""What `sr3 cascade` and `sr3 generate` share: their options, and from these to images and a page of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sr3_jax.cli._options import by_stage, listed, number, whole

MANIFEST = "images.json"


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
    parser.add_argument("-n", "--count", metavar="N", help="images to draw (default: 16)")
    parser.add_argument(
        "--labels", metavar="L,L",
        help="classes, in turn, or 'none' (default: all of the model's in turn, if it has labels)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="a folder")
    parser.add_argument(
        "--steps", metavar="N,N", help="sampling steps, for all stages or each (default: its own)"
    )
    parser.add_argument("--solver", metavar="NAME,NAME", help="sampling methods (default: each model's own)")
    parser.add_argument(
        "--guidance", metavar="G,G", help="strength of the label; 1: no guidance (default: its own)"
    )
    parser.add_argument(
        "--augment",
        metavar="A,A",
        help="strength of the condition's augmentation, 0 to 1 (default: each model's own)",
    )
    parser.add_argument("--seed", default="0", metavar="S", help="same seed, same images (default: 0)")
    parser.add_argument(
        "--batch-size", metavar="B", help="images at a time (default: 64, fewer of large ones)"
    )
    parser.add_argument("--unfinished", action="store_true", help="allow stages that are still in training")


def draw(args: argparse.Namespace, paths: list[str], low_res: list[Path] | None, *, keep: bool) -> int:
    """Draw by the stages at these paths and write the page; exit code 0."""
    from tqdm import tqdm

    from sr3_jax import files
    from sr3_jax.distributed.processes import start_processes, wait_for_all
    from sr3_jax.distributed.signals import exit_if_stopped, stop_signals
    from sr3_jax.errors import UserError
    from sr3_jax.inference import cascade, contact_sheet, stages

    links = stages.find_stages(paths)
    starts = _read(low_res, args.output) if low_res else None
    sizes = [image.shape[:2] for image in starts or ()]
    stages.check_chain(links, low_res=sizes, unfinished=args.unfinished)
    count = (16 if starts is None else len(starts)) if args.count is None else whole("--count", args.count)
    if starts is not None and count > len(starts):
        raise UserError(f"--count={count} is more than the {len(starts)} images of --low-res: leave it out")
    job = cascade.CascadeJob(
        links=tuple(links),
        samplings=tuple(_settings(args, links)),
        count=count,
        labels=_labels(args.labels, links, count),
        low_res=None if starts is None else tuple(starts[:count]),
        seed=whole("--seed", args.seed, least=0, most=2**32 - 1),
        batch_size=None if args.batch_size is None else whole("--batch-size", args.batch_size),
    )
    folder = files.make_folder(args.output)
    process = start_processes()
    steps = cascade.prepare(job, processes=process[1])
    total = len(range(process[0], count, process[1])) * len(links)
    with tqdm(total=total, unit="image", disable=None, file=sys.stderr) as bar, stop_signals() as stopped:

        def tell(done: int) -> None:
            bar.update(done)
            exit_if_stopped(stopped())

        cascade.generate(job, steps, folder, process=process, on_stage=bar.set_description, on_images=tell)
    wait_for_all()
    if process[0] == 0:
        names = contact_sheet.write(job, folder)
        labels = [None] * count if job.labels is None else job.labels.tolist()
        manifest: dict[str, Any] = {
            "command": ["sr3", *sys.argv[1:]],
            "seed": job.seed,
            "stages": [
                {
                    "name": step.link.name,
                    "path": step.link.path,
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
        print(f"{count} images, {', '.join(names)} and {MANIFEST} in {folder}")
    return 0


def _settings(args: argparse.Namespace, links: list[Any]) -> list[Any]:
    """For each stage a function from its own sampling to the one that is asked for."""
    every = [True] * len(links)

    def steps_of(option: str, text: str) -> int:
        return whole(option, text)

    columns = {
        "steps": by_stage("--steps", args.steps, stages=len(links), read=steps_of, takes=every),
        "solver": by_stage(
            "--solver", args.solver, stages=len(links), read=lambda _, text: text, takes=every
        ),
        "guidance": by_stage(
            "--guidance",
            args.guidance,
            stages=len(links),
            read=number,
            takes=[link.guided for link in links],
        ),
        "augment": by_stage(
            "--augment",
            args.augment,
            stages=len(links),
            read=number,
            takes=[link.augmented for link in links],
        ),
    }

    def setting(index: int) -> Any:
        steps, solver = columns["steps"][index], columns["solver"][index]
        rest = {
            name: columns[name][index] for name in ("guidance", "augment") if columns[name][index] is not None
        }
        return lambda own: dataclasses.replace(own.override(steps=steps, solver=solver), **rest)

    return [setting(index) for index in range(len(links))]


def _labels(text: str | None, links: list[Any], count: int) -> Any:
    import numpy as np

    from sr3_jax.errors import UserError

    classes = max(link.classes for link in links)
    if text == "none" or (text is None and not classes):
        return None
    if not classes:
        raise UserError(f"--labels={text}: none of the stages was trained with labels; leave it out")
    given = listed("--labels", text) if text is not None else [str(label) for label in range(classes)]
    labels = [whole("--labels", label, least=0, most=classes - 1) for label in given]
    return np.resize(np.array(labels, np.int32), count)


def _remove_older(folder: Path, files: set[str]) -> None:
    """Remove images of an earlier run with more of them, as its manifest names them: they are none of this run."""
    try:
        before = [
            entry["file"] for entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["images"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for file in before:
        if file not in files and Path(file).name == file:
            (folder / file).unlink(missing_ok=True)


def _read(paths: list[Path], output: Path) -> list[Any]:
    """The images of files and folders, those in the output's folder left out."""
    from sr3_jax.data.folders import walk
    from sr3_jax.errors import UserError
    from sr3_jax.image_io.errors import printable
    from sr3_jax.image_io.image_file import IMAGE_SUFFIXES, ImageError, read_rgb

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found, refused = walk(path)
        if refused:
            raise UserError(f"{printable(refused[0][0])}: {refused[0][1]}: mend its permissions")
        inside = output.resolve()
        files += [
            file
            for file in found
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.resolve().is_relative_to(inside)
        ]
    images = []
    for file in files:
        try:
            images.append(read_rgb(file))
        except ImageError as error:
            raise UserError(f"{printable(file)} {error}") from error
    if not images:
        raise UserError(f"no images in {', '.join(printable(path) for path in paths)}: name others")
    return images
