"""What `sr3 cascade` and `sr3 generate` share: their options, and from these to pictures and a page of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from sr3_jax.cli._options import by_stage, listed, number, whole


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options of both."""
    parser.add_argument("-n", "--count", metavar="N", help="pictures to draw (default: 16)")
    parser.add_argument(
        "--labels", metavar="L,L",
        help="classes, in turn, or 'none' (default: all of the model's in turn, if it has labels)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="a folder")
    parser.add_argument(
        "--steps", metavar="N,N", help="sampling steps, for all stages or each (default: its own)"
    )
    parser.add_argument("--solver", metavar="NAME,NAME", help="sampling methods (default: each model's own)")
    parser.add_argument("--guidance", metavar="G,G", help="strength of the label; 1: no guidance (default)")
    parser.add_argument(
        "--augment", metavar="A,A", help="strength of the condition's augmentation, 0 to 1 (default: 0)"
    )
    parser.add_argument("--seed", default="0", metavar="S", help="same seed, same pictures (default: 0)")
    parser.add_argument("--batch-size", default="64", metavar="B", help="pictures at a time (default: 64)")
    parser.add_argument("--unfinished", action="store_true", help="allow stages that are still in training")


def draw(args: argparse.Namespace, paths: list[str], low_res: list[Path] | None, *, keep: bool) -> int:
    """Draw by the stages at these paths and write the page; exit code 0."""
    from tqdm import tqdm

    from sr3_jax import cascade, outputs, page, stages
    from sr3_jax.aliases import UserError
    from sr3_jax.processes import leave_together, start_processes
    from sr3_jax.signals import leave_if, polled_signals

    links = stages.find_links(paths)
    starts = _read(low_res) if low_res else None
    sizes = [picture.shape[:2] for picture in starts or ()]
    stages.check_chain(links, low_res=sizes, unfinished=args.unfinished)
    count = (16 if starts is None else len(starts)) if args.count is None else whole("--count", args.count)
    if starts is not None and count > len(starts):
        raise UserError(f"--count={count} is more than the {len(starts)} pictures of --low-res: leave it out")
    job = cascade.Run(
        links=tuple(links),
        samplings=tuple(_settings(args, links)),
        count=count,
        labels=_labels(args.labels, links, count),
        low_res=None if starts is None else tuple(starts[:count]),
        seed=whole("--seed", args.seed, least=0, most=2**32 - 1),
        batch_size=whole("--batch-size", args.batch_size),
    )
    folder = outputs.open_folder(args.output)
    process = start_processes()
    total = len(range(process[0], count, process[1])) * len(links)
    with tqdm(total=total, unit="picture", disable=None, file=sys.stderr) as bar, polled_signals() as stopped:

        def tell(done: int) -> None:
            bar.update(done)
            leave_if(stopped())

        about = cascade.draw(job, folder, process=process, on_stage=bar.set_description, on_pictures=tell)
    leave_together()
    if process[0] == 0:
        labels = [None] * count if job.labels is None else job.labels.tolist()
        manifest: dict[str, Any] = {
            "command": ["sr3", *sys.argv[1:]],
            "seed": job.seed,
            "stages": about,
            "pictures": [{"file": f"{index:05d}.png", "label": label} for index, label in enumerate(labels)],
        }
        outputs.write_text(folder / "cascade.json", json.dumps(manifest, indent=1) + "\n")
        names = page.write(job, folder)
        if not keep:
            shutil.rmtree(folder / "stages", ignore_errors=True)
        print(f"{count} pictures, {', '.join(names)} and cascade.json in {folder}")
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
            takes=[link.classes > 0 for link in links],
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
        return lambda own: dataclasses.replace(own.asked(steps=steps, solver=solver), **rest)

    return [setting(index) for index in range(len(links))]


def _labels(text: str | None, links: list[Any], count: int) -> Any:
    import numpy as np

    from sr3_jax.aliases import UserError

    classes = max(link.classes for link in links)
    if text == "none" or (text is None and not classes):
        return None
    if not classes:
        raise UserError(f"--labels={text}: none of the stages was trained with labels; leave it out")
    given = listed("--labels", text) if text is not None else [str(label) for label in range(classes)]
    labels = [whole("--labels", label, least=0, most=classes - 1) for label in given]
    return np.resize(np.array(labels, np.int32), count)


def _read(paths: list[Path]) -> list[Any]:
    from sr3_jax.aliases import UserError
    from sr3_jax.picture_errors import printable
    from sr3_jax.picture_jobs import find_pictures
    from sr3_jax.pictures import PictureError, read_rgb

    pictures = []
    for job in find_pictures(paths, Path("unused")).jobs:
        try:
            pictures.append(read_rgb(job.source))
        except PictureError as error:
            raise UserError(f"{printable(job.source)} {error}") from error
    if not pictures:
        raise UserError(f"no pictures in {', '.join(printable(path) for path in paths)}: name others")
    return pictures
