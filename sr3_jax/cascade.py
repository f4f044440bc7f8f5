"""A cascade (paper section 4.4): stages that were trained alone, chained through pictures of 8 bits.

A base stage makes small pictures of noise, each SR stage makes larger ones of them.

Shape legend: n pictures, B of them at a time, H x W a picture.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax import __version__
from sr3_jax.aliases import Key, UserError
from sr3_jax.model import Model, load
from sr3_jax.outputs import digest, write_text
from sr3_jax.pictures import Picture, PictureError, read_rgb, write_picture
from sr3_jax.sampling import Sampling, fingerprint
from sr3_jax.stages import Link


@dataclass(frozen=True, eq=False)
class Run:
    """What a cascade is asked for.

    Attributes:
        links: the stages, checked by `check_chain`.
        samplings: how each is sampled, in their order; None: as its own model says.
        labels: [n] of the pictures; None for none.
        low_res: the pictures uint8 [H,W,3] to start from; None: a base stage makes them.
        batch_size: pictures at a time; the same for all, so that a batch's rounding does not depend on n.
    """

    links: tuple[Link, ...]
    samplings: tuple[Callable[[Sampling], Sampling], ...]
    count: int
    labels: np.ndarray | None
    low_res: tuple[np.ndarray, ...] | None
    seed: int
    batch_size: int


def picture_path(folder: Path, run: Run, number: int, index: int) -> Path:
    """Where picture `index` of stage `number` goes: the last stage's into the folder itself."""
    last = number == len(run.links) - 1
    return (folder if last else folder / "stages" / run.links[number].name) / f"{index:05d}.png"


def draw(
    run: Run,
    folder: Path,
    *,
    process: tuple[int, int] = (0, 1),
    on_stage: Callable[[str], None] = lambda title: None,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Draw all pictures stage by stage into a folder; stages that are finished there are not drawn again.

    A picture follows from the seed, its index, its label and the stages. The weights of a stage are freed before the
    next stage's are read. Several processes share the pictures.

    Args:
        process: (index, count) of this process.
        on_stage: told a stage's title before it begins.
        on_pictures: told how many pictures are done or found, after each batch.

    Returns:
        What each stage was: name, path, the digest of its weights, its sampling.
    """
    mine = range(process[0], run.count, process[1])
    identity = digest({"version": __version__, "seed": run.seed, "batch_size": run.batch_size, "of": process[1]} | {
        "low_res": None if run.low_res is None else [digest(picture) for picture in run.low_res],
        "labels": None if run.labels is None else run.labels.tolist(), "count": run.count,
    })  # fmt: skip
    about = []
    for number, link in enumerate(run.links):
        on_stage(link.title)
        model = load(link.path)
        sampling = run.samplings[number](model.sampling)
        facts = {
            "name": link.name,
            "path": link.path,
            "weights": fingerprint(model.params),
            "sampling": dataclasses.asdict(sampling),
        }
        about.append(facts)
        identity = digest({"before": identity, "weights": facts["weights"], "sampling": facts["sampling"]})
        record = folder / "stages" / f"{link.name}.{process[0]}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        if _finished(record, identity) and all(picture_path(folder, run, number, i).is_file() for i in mine):
            on_pictures(len(mine))
        else:
            for indices in _batches(run, folder, number, mine):
                pictures = _draw_batch(run, folder, number, model, sampling, indices)
                for index, picture in zip(indices, pictures, strict=True):
                    path = picture_path(folder, run, number, index)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_picture(path, Picture(picture))
                on_pictures(len(indices))
            write_text(record, json.dumps({"identity": identity}) + "\n")
        del model
        gc.collect()  # the weights, before the next stage's are read
    return about


def _finished(record: Path, identity: str) -> bool:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _input(run: Run, folder: Path, number: int, index: int) -> np.ndarray:
    if number == 0:
        assert run.low_res is not None
        return run.low_res[index]
    path = picture_path(folder, run, number - 1, index)
    try:
        return read_rgb(path)
    except PictureError as error:
        raise UserError(f"{path} {error}: delete it and run the command again") from error


def _batches(run: Run, folder: Path, number: int, mine: Sequence[int]) -> list[list[int]]:
    """The indices of this process in groups of one size of picture, each of at most a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in mine:
        low_res = run.low_res is not None or number > 0
        shape = _input(run, folder, number, index).shape if low_res else ()
        groups.setdefault(shape, []).append(index)
    size = run.batch_size
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _draw_batch(
    run: Run, folder: Path, number: int, model: Model, sampling: Sampling, indices: list[int]
) -> np.ndarray:
    # Filled up with copies: another batch shape is another program, which may round differently.
    filled = (indices * run.batch_size)[: run.batch_size]
    keys = _keys(run.seed, number, filled)
    labels = None
    if run.labels is not None and model.network.num_classes:
        labels = run.labels[filled]
    try:
        if model.network.low_res:
            images = np.stack([_input(run, folder, number, index) for index in indices])
            images = images[np.arange(run.batch_size) % len(indices)]
            output = model.upscale(images, keys, labels=labels, sampling=sampling)
        else:
            output = model.generate(len(filled), keys, labels=labels, sampling=sampling)
    except FloatingPointError as error:
        raise UserError(f"stage {run.links[number].title}: {error}") from error
    return output[: len(indices)]


def _keys(seed: int, number: int, indices: Sequence[int]) -> Key:
    """A key for each picture, whatever its batch."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))
