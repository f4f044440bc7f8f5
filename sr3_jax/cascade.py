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

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax import __version__
from sr3_jax.aliases import Key, UserError
from sr3_jax.files import digest, write_text
from sr3_jax.model import Model, load
from sr3_jax.pictures.picture import Picture, PictureError, read_rgb, write_picture
from sr3_jax.sampling import Sampling, fingerprint
from sr3_jax.stages import Link

BATCH, PIXELS = 64, 64 * 256**2  # the most pictures of a batch, and the most pixels


@dataclass(frozen=True, eq=False)
class Run:
    """What a cascade is asked for.

    Attributes:
        links: the stages, checked by `check_chain`.
        samplings: from each stage's own sampling to the one that is asked for, in their order.
        labels: [n] of the pictures; None for none.
        low_res: the pictures uint8 [H,W,3] to start from; None: a base stage makes them.
        batch_size: pictures at a time; None: as many as a stage's size allows. It never follows from n, so that a
            batch's rounding does not depend on it.
    """

    links: tuple[Link, ...]
    samplings: tuple[Callable[[Sampling], Sampling], ...]
    count: int
    labels: np.ndarray | None
    low_res: tuple[np.ndarray, ...] | None
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class Step:
    """A stage of a run, ready: how it is sampled, and a digest of all that its pictures depend on."""

    link: Link
    sampling: Sampling
    weights: str
    identity: str


def picture_path(folder: Path, run: Run, number: int, index: int) -> Path:
    """Where picture `index` of stage `number` goes: the last stage's into the folder itself."""
    last = number == len(run.links) - 1
    return (folder if last else folder / "stages" / run.links[number].name) / f"{index:05d}.png"


def prepare(run: Run, *, processes: int = 1) -> list[Step]:
    """Load each stage once, before anything is drawn, and check what is asked of it.

    Raises:
        UserError: a stage cannot be read, or cannot do what is asked of it.
    """
    identity = digest(
        {
            "version": __version__,
            "seed": run.seed,
            "batch_size": run.batch_size,
            "processes": processes,
            "count": run.count,
            "low_res": None if run.low_res is None else [digest(picture) for picture in run.low_res],
            "labels": None if run.labels is None else run.labels.tolist(),
        }
    )
    steps = []
    for link, choose in zip(run.links, run.samplings, strict=True):
        model = load(link.path)
        sampling = choose(model.sampling)
        model.check(sampling, labels=_labels(run, model, range(run.count)), count=run.count)
        weights = fingerprint(model.params)
        identity = digest({"before": identity, "weights": weights, "sampling": dataclasses.asdict(sampling)})
        steps.append(Step(link, sampling, weights, identity))
        del model
        gc.collect()
    return steps


def draw(
    run: Run,
    steps: Sequence[Step],
    folder: Path,
    *,
    process: tuple[int, int] = (0, 1),
    on_stage: Callable[[str], None] = lambda title: None,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw all pictures stage by stage into a folder, after the last stage that is finished there.

    A picture follows from the seed, its index, its label and the stages. The weights of a stage are freed before the
    next stage's are read. Several processes share the pictures.

    Args:
        process: (index, count) of this process.
        on_stage: told a stage's title before it begins.
        on_pictures: told how many pictures are done or found, after each batch.

    Raises:
        UserError: a picture cannot be drawn or written.
    """
    mine = range(process[0], run.count, process[1])
    done = [_finished(run, steps, folder, number, process) for number in range(len(steps))]
    first = max((number + 1 for number, finished in enumerate(done) if finished), default=0)
    on_pictures(first * len(mine))
    for number, step in list(enumerate(steps))[first:]:
        on_stage(step.link.title)
        _forget(folder, step)
        model = load(step.link.path)
        for indices in _batches(run, folder, number, mine, _batch_size(run, step.link)):
            pictures = _draw_batch(run, folder, number, model, step.sampling, indices)
            for index, picture in zip(indices, pictures, strict=True):
                path = picture_path(folder, run, number, index)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_picture(path, Picture(picture))
                except PictureError as error:
                    raise UserError(f"{path} {error}") from error
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be written ({error.strerror}): name another folder"
                    ) from error
            on_pictures(len(indices))
        write_text(_record(folder, step, process[0]), json.dumps({"identity": step.identity}) + "\n")
        del model
        gc.collect()  # the weights, before the next stage's are read


def remove_intermediate(run: Run, folder: Path) -> None:
    """Remove what the stages before the last drew, and nothing else."""
    for number, link in enumerate(run.links[:-1]):
        for index in range(run.count):
            picture_path(folder, run, number, index).unlink(missing_ok=True)
        place = folder / "stages" / link.name
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _record(folder: Path, step: Step, process: int) -> Path:
    place = folder / "stages"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{place} cannot be made ({error.strerror}): name another folder with -o") from error
    return place / f"{step.link.name}.{process}.json"


def _identity(record: Path) -> str | None:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(run: Run, steps: Sequence[Step], folder: Path, number: int, process: tuple[int, int]) -> bool:
    if _identity(_record(folder, steps[number], process[0])) != steps[number].identity:
        return False
    mine = range(process[0], run.count, process[1])
    return all(picture_path(folder, run, number, index).is_file() for index in mine)


def _forget(folder: Path, step: Step) -> None:
    """Before pictures are drawn over others: no record may say any more that those are there."""
    for record in (folder / "stages").glob(f"{step.link.name}.*.json"):
        if _identity(record) != step.identity:
            record.unlink(missing_ok=True)


def _batch_size(run: Run, link: Link) -> int:
    if run.batch_size is not None:
        return run.batch_size
    devices = jax.local_device_count()
    given = max((max(picture.shape[:2]) for picture in run.low_res or ()), default=64)
    side = link.stage.size or 16 * given  # of any size: a guess on the safe side
    fits = min(BATCH, max(1, PIXELS // side**2))
    return max(fits // devices, 1) * devices


def _input(run: Run, folder: Path, number: int, index: int) -> np.ndarray:
    if number == 0:
        assert run.low_res is not None
        return run.low_res[index]
    path = picture_path(folder, run, number - 1, index)
    try:
        return read_rgb(path)
    except PictureError as error:
        raise UserError(f"{path} {error}: delete it and run the command again") from error


def _batches(run: Run, folder: Path, number: int, mine: Sequence[int], size: int) -> list[list[int]]:
    """The indices of this process in groups of one size of picture, each of at most a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    if number > 0 and run.links[number].stage.size:
        groups[()] = list(mine)  # all of one size, which need not be read to know it
    else:
        for index in mine:
            shape = () if number == 0 and run.low_res is None else _input(run, folder, number, index).shape
            groups.setdefault(shape, []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _labels(run: Run, model: Model, indices: Sequence[int]) -> np.ndarray | None:
    if run.labels is None or not model.network.num_classes:
        return None
    return run.labels[np.asarray(indices, int)]


def _draw_batch(
    run: Run, folder: Path, number: int, model: Model, sampling: Sampling, indices: list[int]
) -> np.ndarray:
    # Filled up with copies: another batch shape is another program, which may round differently.
    size = _batch_size(run, run.links[number])
    filled = [indices[place % len(indices)] for place in range(size)]
    keys, labels = _keys(run.seed, number, filled), _labels(run, model, filled)
    try:
        if model.network.low_res:
            images = np.stack([_input(run, folder, number, index) for index in indices])
            images = images[np.arange(size) % len(indices)]
            output = model.upscale(images, keys, labels=labels, sampling=sampling)
        else:
            output = model.generate(size, keys, labels=labels, sampling=sampling)
    except FloatingPointError as error:
        raise UserError(f"stage {run.links[number].title}: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise UserError(
            f"stage {run.links[number].title} needs more memory than the device has for {size} pictures at a time: "
            "give a smaller --batch-size"
        ) from error
    return output[: len(indices)]


def _keys(seed: int, number: int, indices: Sequence[int]) -> Key:
    """A key for each picture, whatever its batch."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))
