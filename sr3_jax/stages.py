"""The stages of a cascade as they lie on disk, and whether they chain: told before any weights are read.

A stage is a model that knows its name, size and scale (`config.stage`, `config.data.scale`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sr3_jax.aliases import UserError
from sr3_jax.checkpoint import CONFIG_FILE, newest_step, read_config, read_export_config
from sr3_jax.model import locate
from sr3_jax.outputs import file_name
from sr3_jax.parts import Stage

PLAN_FILE = (
    "cascade.json"  # in the folder of all stages, which `sr3 train` of a cascade writes: their names in order
)


@dataclass(frozen=True)
class Link:
    """A stage as it lies on disk, its weights unread.

    Attributes:
        name: of the stage, unique in the cascade and fit for a folder.
        channels: of the pictures.
        classes: of the labels it is told; 0 for none.
        augmented: whether it is told the strength of its condition's augmentation.
        progress: (newest step, steps of its training); None of an exported file.
    """

    path: str
    name: str
    stage: Stage
    channels: int
    classes: int
    augmented: bool
    progress: tuple[int, int] | None

    @property
    def title(self) -> str:
        """The stage in an error."""
        size, scale = self.stage.size, self.stage.scale
        if scale is None:
            return f"{self.name} (base{f', {size}x{size}' if size else ''})"
        return f"{self.name} ({f'{size // scale}x{size // scale} to {size}x{size}' if size else f'{scale}x'})"


def find_links(paths: Sequence[str]) -> list[Link]:
    """The stages named by workdirs, exported files or shipped names, or those of the one folder of a whole cascade.

    Raises:
        UserError: one is missing or is no model of ours.
    """
    if len(paths) == 1 and (Path(paths[0]) / PLAN_FILE).is_file():
        names = json.loads((Path(paths[0]) / PLAN_FILE).read_text(encoding="utf-8"))["stages"]
        paths = [str(Path(paths[0]) / name) for name in names]
    taken: set[str] = set()
    return [_link(path, taken) for path in paths]


def _link(path: str, taken: set[str]) -> Link:
    found = locate(path)
    progress = None
    if found.is_dir():
        if not (found / CONFIG_FILE).is_file():
            raise UserError(f"stage {path} has no {CONFIG_FILE}: give a workdir of sr3 train")
        config = read_config(found)
        step = newest_step(found)
        if step is None:
            raise UserError(f"stage {path} has no checkpoint yet: train it first")
        progress = (step, config["train"]["num_steps"])
    else:
        config = read_export_config(found)
    network, section = config["model"], config.get("stage", {"name": "", "size": 0})
    low_res = network.get("low_res", True)
    return Link(
        path=path,
        name=file_name(section["name"] or found.name.removesuffix(".safetensors"), taken),
        stage=Stage(section["name"], section["size"], config["data"]["scale"] if low_res else None),
        channels=network.get("out_channels", 3),
        classes=network["num_classes"],
        augmented=network["augment"],
        progress=progress,
    )


def check_chain(
    links: Sequence[Link], *, low_res: Sequence[tuple[int, int]] = (), unfinished: bool = False
) -> None:
    """That each stage takes what the one before it makes.

    Args:
        low_res: (height, width) of the pictures to start from instead of a base stage.
        unfinished: allow stages whose training has not come to its end.

    Raises:
        UserError: the first thing that does not fit, and the way out.
    """
    if not links:
        raise UserError("a cascade needs at least one stage: name them in order after --stages")
    first = links[0]
    if low_res and first.stage.scale is None:
        raise UserError(f"stage {first.title} makes pictures of noise: leave it out with --low-res")
    if not low_res and first.stage.scale is not None:
        raise UserError(
            f"stage {first.title} needs low-res pictures: begin with a base stage, or give --low-res"
        )
    for link in links[1:]:
        if link.stage.scale is None:
            raise UserError(f"stage {link.title} makes pictures of noise: it must come first")
    made = set(low_res) if low_res else {(first.stage.size, first.stage.size)}
    before = "--low-res" if low_res else first.title
    for link in links if low_res else links[1:]:
        size, scale = link.stage.size, link.stage.scale or 1
        wrong = [
            each for each in sorted(made) if size and all(each) and each != (size // scale, size // scale)
        ]
        if wrong:
            raise UserError(
                f"stage {link.title} takes pictures of {size // scale}x{size // scale}, but {before} gives "
                f"{wrong[0][1]}x{wrong[0][0]}: put another stage between them, or give the stages in order"
            )
        made = {(size, size)} if size else {(high * scale, wide * scale) for high, wide in made}
        before = link.title
    for link in links[1:]:
        if link.channels != first.channels:
            raise UserError(
                f"stage {link.title} has {link.channels} channels, but {first.title} {first.channels}"
            )
        if link.classes and first.classes and link.classes != first.classes:
            raise UserError(
                f"stage {link.title} has {link.classes} classes, but {first.title} {first.classes}"
            )
    for link in links:
        if link.progress is not None and link.progress[0] < link.progress[1] and not unfinished:
            step, of = link.progress
            raise UserError(
                f"stage {link.title} in {link.path} is at step {step} of {of}: finish its training, or allow it with "
                "--unfinished"
            )
