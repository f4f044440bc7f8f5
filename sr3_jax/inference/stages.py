"""The stages of a cascade as they lie on disk, and whether they chain: told before any weights are read.

A stage is a model that knows its name, size and scale (`config.stage`, `config.data.scale`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sr3_jax.config.build import Stage
from sr3_jax.errors import UserError
from sr3_jax.files import unique_file_name
from sr3_jax.train.checkpoints import CONFIG_FILE, newest_step, read_config
from sr3_jax.train.weights import locate_model, read_export_config

PLAN_FILE = "cascade.json"  # in the folder of all stages, which `sr3 train` writes: their names in order


@dataclass(frozen=True)
class StageInfo:
    """A stage as it lies on disk, its weights unread.

    Attributes:
        name: of the stage, unique in the cascade and fit for a folder.
        classes: of the labels it is told; 0 for none.
        guided: whether it was trained with labels dropped, which guidance needs.
        augmented: whether it is told the strength of its condition's augmentation.
        progress: (newest step, steps of its training); None of an exported file, or before training.
    """

    path: str
    name: str
    stage: Stage
    classes: int
    guided: bool
    augmented: bool
    progress: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """The stage in an error."""
        size, scale = self.stage.size, self.stage.scale
        if scale is None:
            return f"{self.name} (base, {size}x{size})"
        return f"{self.name} ({f'{size // scale}x{size // scale} to {size}x{size}' if size else f'{scale}x'})"


def find_stages(paths: Sequence[str]) -> list[StageInfo]:
    """The stages named by workdirs, exported files or shipped names, or those of the one folder of a whole cascade.

    Raises:
        UserError: one is missing or is no model of ours.
    """
    plan = Path(paths[0]) / PLAN_FILE
    if len(paths) == 1 and plan.is_file():
        try:
            paths = [
                str(plan.parent / name) for name in json.loads(plan.read_text(encoding="utf-8"))["stages"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{plan} does not name the stages of a cascade: name their folders one by one after --stages"
            ) from None
    taken: set[str] = set()
    return [_found(path, taken) for path in paths]


def _found(path: str, taken: set[str]) -> StageInfo:
    found = locate_model(path)
    if not found.is_dir():
        return stage_from_config(read_export_config(found), path, name=found.stem, taken=taken)
    if not (found / CONFIG_FILE).is_file():
        raise UserError(f"stage {path} has no {CONFIG_FILE}: give a workdir of sr3 train")
    config, step = read_config(found), newest_step(found)
    if step is None:
        raise UserError(f"stage {path} has no checkpoint yet: train it first")
    return stage_from_config(config, path, name=found.name, taken=taken, step=step)


def stage_from_config(
    config: Mapping[str, Any], path: str, *, name: str, taken: set[str], step: int | None = None
) -> StageInfo:
    """The stage of a config. `name` is for one without; UserError if the config is not of this package."""
    try:
        network, data, section = config["model"], config["data"], config.get("stage", {})
        low_res = network.get("low_res", True)
        size = section.get("size", 0) or (0 if low_res else data["crop"] // data.get("shrink", 1))
        return StageInfo(
            path=path,
            name=unique_file_name(section.get("name") or name, taken),
            stage=Stage(section.get("name", ""), size, data["scale"] if low_res else None),
            classes=network["num_classes"],
            guided=bool(network["num_classes"] and data.get("label_dropout")),
            augmented=network["augment"],
            progress=None if step is None else (step, config["train"]["num_steps"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the config of stage {path} does not fit this version ({error}): train it again"
        ) from None


def check_chain(
    links: Sequence[StageInfo], *, low_res: Sequence[tuple[int, int]] = (), unfinished: bool = False
) -> None:
    """That each stage takes what the one before it makes.

    Args:
        low_res: (height, width) of the images to start from instead of a base stage.
        unfinished: allow stages whose training has not come to its end.

    Raises:
        UserError: the first thing that does not fit, and the way out.
    """
    if not links:
        raise UserError("a cascade needs at least one stage: name them in order after --stages")
    first = links[0]
    if low_res and first.stage.scale is None:
        raise UserError(f"stage {first.title} makes images of noise: leave it out with --low-res")
    if not low_res and first.stage.scale is not None:
        raise UserError(
            f"stage {first.title} needs low-res images: begin with a base stage, or give --low-res"
        )
    for link in links[1:]:
        if link.stage.scale is None:
            raise UserError(f"stage {link.title} makes images of noise: it must come first")
    made = set(low_res) if low_res else {(first.stage.size, first.stage.size)}
    before = "--low-res" if low_res else first.title
    for link in links if low_res else links[1:]:
        size, scale = link.stage.size, link.stage.scale or 1
        wrong = [each for each in sorted(made) if size and each != (size // scale, size // scale)]
        if wrong:
            raise UserError(
                f"stage {link.title} takes images of {size // scale}x{size // scale}, but {before} gives "
                f"{wrong[0][1]}x{wrong[0][0]}: put another stage between them, or give the stages in order"
            )
        made = {(high * scale, wide * scale) for high, wide in made}
        before = link.title
    labelled = [link for link in links if link.classes]
    for link in labelled[1:]:
        if link.classes != labelled[0].classes:
            raise UserError(
                f"stage {link.title} has {link.classes} classes, but {labelled[0].title} {labelled[0].classes}"
            )
    for link in links:
        if link.progress is not None and link.progress[0] < link.progress[1] and not unfinished:
            step, of = link.progress
            raise UserError(
                f"stage {link.title} in {link.path} is at step {step} of {of}: finish its training, or allow it with "
                "--unfinished"
            )
