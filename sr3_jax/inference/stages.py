"""Stages of a cascade on disk, and whether they fit together: checked before any weights are read.

A stage is a model whose config has its name, image size and scale (`config.stage`, `config.data.scale`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sr3_jax.config.build import Stage
from sr3_jax.errors import UserError
from sr3_jax.files import read_json, unique_file_name
from sr3_jax.storage import as_path
from sr3_jax.train.checkpoints import CONFIG_FILE, newest_step, read_config
from sr3_jax.train.weights import locate_model, read_export_config

PLAN_FILE = "cascade.json"  # written by `sr3 train` into the folder of all stages: their names in order


@dataclass(frozen=True)
class StageInfo:
    """A stage on disk, described by its config.

    Attributes:
        path: workdir, exported file or shipped name.
        name: unique in the cascade and usable as a folder name.
        classes: number of class labels; 0 for none.
        guided: whether it was trained with label dropout, which guidance needs.
        augmented: whether it takes the strength of the conditioning augmentation.
        progress: (newest step, training steps); None for an exported file, or before training.
    """

    path: str
    name: str
    spec: Stage
    classes: int
    guided: bool
    augmented: bool
    progress: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """Name and sizes for messages, such as "sr (16x16 to 32x32)"."""
        size, scale = self.spec.size, self.spec.scale
        if scale is None:
            return f"{self.name} (base, {size}x{size})"
        return f"{self.name} ({f'{size // scale}x{size // scale} to {size}x{size}' if size else f'{scale}x'})"


def find_stages(paths: Sequence[str]) -> list[StageInfo]:
    """The stages at these workdirs, exported files or shipped names, or in the one folder of a whole cascade.

    Raises:
        UserError: one is missing or is not an sr3_jax model.
    """
    plan = as_path(paths[0]) / PLAN_FILE
    if len(paths) == 1 and plan.is_file():
        try:
            paths = [str(plan.parent / name) for name in read_json(plan)["stages"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{plan} is not a valid cascade file: name the folders of the stages one by one after --stages"
            ) from None
    taken: set[str] = set()
    return [_open_stage(path, taken) for path in paths]


def _open_stage(path: str, taken: set[str]) -> StageInfo:
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
    """The stage of a complete config.

    Args:
        name: for a stage that has no `config.stage.name`.
        taken: names of the other stages; the new one is added.
        step: of the newest checkpoint; None for an exported file.
    """
    network, data, section = config["model"], config["data"], config["stage"]
    size = section["size"] or (0 if network["low_res"] else data["crop"] // data["shrink"])
    return StageInfo(
        path=path,
        name=unique_file_name(section["name"] or name, taken),
        spec=Stage(section["name"], size, data["scale"] if network["low_res"] else None),
        classes=network["num_classes"],
        guided=bool(network["num_classes"] and data["label_dropout"]),
        augmented=network["augment"],
        progress=None if step is None else (step, config["train"]["num_steps"]),
    )


def check_chain(
    stages: Sequence[StageInfo], *, low_res: Sequence[tuple[int, int]] = (), unfinished: bool = False
) -> None:
    """Check that each stage accepts the output of the stage before it.

    Args:
        low_res: (height, width) of the images to start from instead of a base model.
        unfinished: allow stages that are still in training.

    Raises:
        UserError: the first mismatch, with the fix.
    """
    if not stages:
        raise UserError("a cascade needs at least one stage: name them in order after --stages")
    first = stages[0]
    if low_res and first.spec.scale is None:
        raise UserError(
            f"stage {first.title} is unconditional and takes no --low-res images: omit one of the two"
        )
    if not low_res and first.spec.scale is not None:
        raise UserError(
            f"stage {first.title} needs low-res images: start with an unconditional base model, or give --low-res"
        )
    for stage in stages[1:]:
        if stage.spec.scale is None:
            raise UserError(f"stage {stage.title} is unconditional: it must come first")
    made = set(low_res) if low_res else {(first.spec.size, first.spec.size)}
    before = "--low-res" if low_res else first.title
    for stage in stages if low_res else stages[1:]:
        size, scale = stage.spec.size, stage.spec.scale or 1
        wrong = [each for each in sorted(made) if size and each != (size // scale, size // scale)]
        if wrong:
            raise UserError(
                f"stage {stage.title} takes {size // scale}x{size // scale} images, but {before} gives "
                f"{wrong[0][1]}x{wrong[0][0]}: reorder the stages, or add one in between"
            )
        made = {(high * scale, wide * scale) for high, wide in made}
        before = stage.title
    labeled = [stage for stage in stages if stage.classes]
    for stage in labeled[1:]:
        if stage.classes != labeled[0].classes:
            raise UserError(
                f"stage {stage.title} has {stage.classes} classes, but {labeled[0].title} has {labeled[0].classes}: "
                "use stages with the same classes"
            )
    for stage in stages:
        if stage.progress is not None and stage.progress[0] < stage.progress[1] and not unfinished:
            step, of = stage.progress
            raise UserError(
                f"stage {stage.title} in {stage.path} is at step {step} of {of}: finish its training, or add "
                "--unfinished"
            )
