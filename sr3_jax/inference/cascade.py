"""A cascade (paper section 4.4): stages that were trained alone, chained through images of 8 bits.

A base stage makes small images of noise, each SR stage makes larger ones of them.

Shape legend: n images, B of them at a time, H x W an image.
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
from sr3_jax.errors import UserError
from sr3_jax.files import sha256_hex, write_text
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.model import Model, load
from sr3_jax.inference.sampling_file import params_fingerprint
from sr3_jax.inference.stages import StageInfo
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

BATCH, PIXELS = 64, 64 * 256**2  # the most images of a batch, and the most pixels


@dataclass(frozen=True, eq=False)
class CascadeJob:
    """What a cascade is asked for.

    Attributes:
        links: the stages, checked by `check_chain`.
        samplings: from each stage's own sampling to the one that is asked for, in their order.
        labels: [n] of the images; None for none.
        low_res: the images uint8 [H,W,3] to start from; None: a base stage makes them.
        batch_size: images at a time; None: as many as a stage's size allows. It never follows from n, so that a
            batch's rounding does not depend on it.
    """

    links: tuple[StageInfo, ...]
    samplings: tuple[Callable[[Sampling], Sampling], ...]
    count: int
    labels: np.ndarray | None
    low_res: tuple[np.ndarray, ...] | None
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class PreparedStage:
    """A stage of a run, ready: how it is sampled, and a digest of all that its images depend on."""

    link: StageInfo
    sampling: Sampling
    weights: str
    identity: str


def image_path(folder: Path, run: CascadeJob, number: int, index: int) -> Path:
    """Where image `index` of stage `number` goes: the last stage's into the folder itself."""
    last = number == len(run.links) - 1
    return (folder if last else folder / "stages" / run.links[number].name) / f"{index:05d}.png"


def prepare(run: CascadeJob, *, processes: int = 1) -> list[PreparedStage]:
    """Load each stage once, before anything is drawn, and check what is asked of it.

    Raises:
        UserError: a stage cannot be read, or cannot do what is asked of it.
    """
    identity = sha256_hex(
        {
            "version": __version__,
            "seed": run.seed,
            "batch_size": run.batch_size,
            "processes": processes,
            "count": run.count,
            "low_res": None if run.low_res is None else [sha256_hex(image) for image in run.low_res],
            "labels": None if run.labels is None else run.labels.tolist(),
        }
    )
    steps = []
    for link, choose in zip(run.links, run.samplings, strict=True):
        model = load(link.path)
        sampling = choose(model.sampling)
        model.check(sampling, labels=_labels(run, model, range(run.count)), count=run.count)
        weights = params_fingerprint(model.params)
        identity = sha256_hex(
            {"before": identity, "weights": weights, "sampling": dataclasses.asdict(sampling)}
        )
        steps.append(PreparedStage(link, sampling, weights, identity))
        del model
        gc.collect()
    return steps


def generate(
    run: CascadeJob,
    steps: Sequence[PreparedStage],
    folder: Path,
    *,
    process: tuple[int, int] = (0, 1),
    on_stage: Callable[[str], None] = lambda title: None,
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw all images stage by stage into a folder, after the last stage that is finished there.

    An image follows from the seed, its index, its label and the stages. The weights of a stage are freed before the
    next stage's are read. Several processes share the images.

    Args:
        process: (index, count) of this process.
        on_stage: told a stage's title before it begins.
        on_images: told how many images are done or found, after each batch.

    Raises:
        UserError: an image cannot be drawn or written.
    """
    mine = range(process[0], run.count, process[1])
    done = [_finished(run, steps, folder, number, process) for number in range(len(steps))]
    first = max((number + 1 for number, finished in enumerate(done) if finished), default=0)
    on_images(first * len(mine))
    for number, step in list(enumerate(steps))[first:]:
        on_stage(step.link.title)
        _forget(folder, step)
        model = load(step.link.path)
        for indices in _batches(run, folder, number, mine, _batch_size(run, step.link)):
            images = _generate_batch(run, folder, number, model, step.sampling, indices)
            for index, image in zip(indices, images, strict=True):
                path = image_path(folder, run, number, index)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_image(path, DecodedImage(image))
                except ImageError as error:
                    raise UserError(f"{path} {error}") from error
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be written ({error.strerror}): name another folder"
                    ) from error
            on_images(len(indices))
        write_text(_record(folder, step, process[0]), json.dumps({"identity": step.identity}) + "\n")
        del model
        gc.collect()  # the weights, before the next stage's are read


def remove_intermediate(run: CascadeJob, folder: Path) -> None:
    """Remove what the stages before the last drew, and nothing else."""
    for number, link in enumerate(run.links[:-1]):
        for index in range(run.count):
            image_path(folder, run, number, index).unlink(missing_ok=True)
        place = folder / "stages" / link.name
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _record(folder: Path, step: PreparedStage, process: int) -> Path:
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


def _finished(
    run: CascadeJob, steps: Sequence[PreparedStage], folder: Path, number: int, process: tuple[int, int]
) -> bool:
    if _identity(_record(folder, steps[number], process[0])) != steps[number].identity:
        return False
    mine = range(process[0], run.count, process[1])
    return all(image_path(folder, run, number, index).is_file() for index in mine)


def _forget(folder: Path, step: PreparedStage) -> None:
    """Before images are drawn over others: no record may say any more that those are there."""
    for record in (folder / "stages").glob(f"{step.link.name}.*.json"):
        if _identity(record) != step.identity:
            record.unlink(missing_ok=True)


def _batch_size(run: CascadeJob, link: StageInfo) -> int:
    if run.batch_size is not None:
        return run.batch_size
    devices = jax.local_device_count()
    given = max((max(image.shape[:2]) for image in run.low_res or ()), default=64)
    side = link.stage.size or 16 * given  # of any size: a guess on the safe side
    fits = min(BATCH, max(1, PIXELS // side**2))
    return max(fits // devices, 1) * devices


def _input(run: CascadeJob, folder: Path, number: int, index: int) -> np.ndarray:
    if number == 0:
        assert run.low_res is not None
        return run.low_res[index]
    path = image_path(folder, run, number - 1, index)
    try:
        return read_rgb(path)
    except ImageError as error:
        raise UserError(f"{path} {error}: delete it and run the command again") from error


def _batches(run: CascadeJob, folder: Path, number: int, mine: Sequence[int], size: int) -> list[list[int]]:
    """The indices of this process in groups of one size of image, each of at most a batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    if number > 0 and run.links[number].stage.size:
        groups[()] = list(mine)  # all of one size, which need not be read to know it
    else:
        for index in mine:
            shape = () if number == 0 and run.low_res is None else _input(run, folder, number, index).shape
            groups.setdefault(shape, []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _labels(run: CascadeJob, model: Model, indices: Sequence[int]) -> np.ndarray | None:
    if run.labels is None or not model.network.num_classes:
        return None
    return run.labels[np.asarray(indices, int)]


def _generate_batch(
    run: CascadeJob, folder: Path, number: int, model: Model, sampling: Sampling, indices: list[int]
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
            f"stage {run.links[number].title} needs more memory than the device has for {size} images at a time: "
            "give a smaller --batch-size"
        ) from error
    return output[: len(indices)]


def _keys(seed: int, number: int, indices: Sequence[int]) -> Key:
    """A key for each image, whatever its batch."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))
