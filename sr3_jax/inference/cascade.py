"""Cascades (paper section 4.3): stages that were trained separately, chained through 8-bit images.

An unconditional base model generates small images from noise; each super-resolution stage upscales them.

Shape legend: n images, B per batch, H x W an image.
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
from sr3_jax.files import read_json, sha256_hex, write_text
from sr3_jax.image_io.image_file import DecodedImage, ImageError, read_rgb, write_image
from sr3_jax.inference.loading import load
from sr3_jax.inference.model import Model
from sr3_jax.inference.program import OnStep
from sr3_jax.inference.sampling_file import params_fingerprint
from sr3_jax.inference.stages import StageInfo
from sr3_jax.sampling import Sampling
from sr3_jax.types import Key

BATCH, PIXELS = 64, 64 * 256**2  # largest batch, in images and in pixels


@dataclass(frozen=True, eq=False)
class CascadeJob:
    """The images to generate, and the stages and settings to use.

    Attributes:
        stages: in order, checked by `check_chain`.
        samplings: for each stage, a function from its default sampling settings to those to use.
        count: n.
        labels: [n] class labels; None for none.
        low_res: the images uint8 [H,W,3] to start from; None if the first stage is a base model.
        seed: determines all noise.
        batch_size: images per batch; None for as many as the image size allows. It does not depend on n, because
            rounding depends on the size of the batch.
    """

    stages: tuple[StageInfo, ...]
    samplings: tuple[Callable[[Sampling], Sampling], ...]
    count: int
    labels: np.ndarray | None
    low_res: tuple[np.ndarray, ...] | None
    seed: int
    batch_size: int | None


@dataclass(frozen=True)
class PreparedStage:
    """A stage with its sampling settings, and the fingerprint of everything that its images depend on."""

    stage: StageInfo
    sampling: Sampling
    weights: str
    fingerprint: str


def image_path(folder: Path, job: CascadeJob, number: int, index: int) -> Path:
    """The file of image `index` of stage `number`; those of the last stage are in the folder itself."""
    last = number == len(job.stages) - 1
    return (folder if last else folder / "stages" / job.stages[number].name) / f"{index:05d}.png"


def prepare(job: CascadeJob, *, processes: int = 1) -> list[PreparedStage]:
    """Load each stage once and check its settings, before anything is generated.

    Raises:
        UserError: a stage cannot be read, or cannot be sampled with its settings.
    """
    fingerprint = sha256_hex(
        {
            "version": __version__,
            "seed": job.seed,
            "batch_size": job.batch_size,
            "processes": processes,
            "count": job.count,
            "low_res": None if job.low_res is None else [sha256_hex(image) for image in job.low_res],
            "labels": None if job.labels is None else job.labels.tolist(),
        }
    )
    steps = []
    for stage, choose in zip(job.stages, job.samplings, strict=True):
        model = load(stage.path)
        sampling = choose(model.sampling)
        model.check(sampling, labels=_labels(job, model, range(job.count)), count=job.count)
        weights = params_fingerprint(model.params)
        fingerprint = sha256_hex(
            {"before": fingerprint, "weights": weights, "sampling": dataclasses.asdict(sampling)}
        )
        steps.append(PreparedStage(stage, sampling, weights, fingerprint))
        del model
        gc.collect()
    return steps


def generate(
    job: CascadeJob,
    steps: Sequence[PreparedStage],
    folder: Path,
    *,
    process: tuple[int, int] = (0, 1),
    on_stage: Callable[[str], None] = lambda title: None,
    on_images: Callable[[int], None] = lambda count: None,
    on_step: OnStep | None = None,
) -> None:
    """Generate all images stage by stage into a folder, resuming after the last finished stage.

    An image is a function of the seed, its index, its label and the stages. The weights of a stage are freed before
    the next stage is loaded. Several processes divide the images.

    Args:
        process: (index, count) of this process.
        on_stage: called with a stage's title before it starts.
        on_images: called with the number of images finished since its last call.
        on_step: called after each step of the samplers, see `Model.watched`.

    Raises:
        UserError: an image cannot be generated or written.
    """
    mine = range(process[0], job.count, process[1])
    done = [_finished(job, steps, folder, number, process) for number in range(len(steps))]
    first = max((number + 1 for number, finished in enumerate(done) if finished), default=0)
    on_images(first * len(mine))
    for number, step in list(enumerate(steps))[first:]:
        on_stage(step.stage.title)
        _forget(folder, step)
        model = load(step.stage.path).watched(on_step)
        for indices in _batches(job, folder, number, mine, _batch_size(job, step.stage)):
            images = _generate_batch(job, folder, number, model, step.sampling, indices)
            for index, image in zip(indices, images, strict=True):
                path = image_path(folder, job, number, index)
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_image(path, DecodedImage(image))
                except ImageError as error:
                    raise UserError(f"{path} {error}") from error
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be written ({error.strerror}): choose another folder"
                    ) from error
            on_images(len(indices))
        write_text(_record(folder, step, process[0]), json.dumps({"fingerprint": step.fingerprint}) + "\n")
        del model
        gc.collect()  # frees the weights before the next stage is loaded


def remove_intermediate(job: CascadeJob, folder: Path) -> None:
    """Remove the images of all stages but the last, and nothing else."""
    for number, stage in enumerate(job.stages[:-1]):
        for index in range(job.count):
            image_path(folder, job, number, index).unlink(missing_ok=True)
        place = folder / "stages" / stage.name
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _record(folder: Path, step: PreparedStage, process: int) -> Path:
    place = folder / "stages"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{place} cannot be created ({error.strerror}): choose another folder with -o"
        ) from error
    return place / f"{step.stage.name}.{process}.json"


def _fingerprint(record: Path) -> str | None:
    try:
        return read_json(record)["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished(
    job: CascadeJob, steps: Sequence[PreparedStage], folder: Path, number: int, process: tuple[int, int]
) -> bool:
    if _fingerprint(_record(folder, steps[number], process[0])) != steps[number].fingerprint:
        return False
    mine = range(process[0], job.count, process[1])
    return all(image_path(folder, job, number, index).is_file() for index in mine)


def _forget(folder: Path, step: PreparedStage) -> None:
    """Delete the records of images that are about to be overwritten."""
    for record in (folder / "stages").glob(f"{step.stage.name}.*.json"):
        if _fingerprint(record) != step.fingerprint:
            record.unlink(missing_ok=True)


def _batch_size(job: CascadeJob, stage: StageInfo) -> int:
    if job.batch_size is not None:
        return job.batch_size
    devices = jax.local_device_count()
    given = max((max(image.shape[:2]) for image in job.low_res or ()), default=64)
    side = stage.spec.size or 16 * given  # size unknown: a safe guess
    fits = min(BATCH, max(1, PIXELS // side**2))
    return max(fits // devices, 1) * devices


def _input(job: CascadeJob, folder: Path, number: int, index: int) -> np.ndarray:
    if number == 0:
        assert job.low_res is not None
        return job.low_res[index]
    path = image_path(folder, job, number - 1, index)
    try:
        return read_rgb(path)
    except ImageError as error:
        raise UserError(f"{path} {error}: delete it and run the command again") from error


def _batches(job: CascadeJob, folder: Path, number: int, mine: Sequence[int], size: int) -> list[list[int]]:
    """The indices of this process in batches of images of equal size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    if number > 0 and job.stages[number].spec.size:
        groups[()] = list(mine)  # all of one size: no need to read them
    else:
        for index in mine:
            shape = () if number == 0 and job.low_res is None else _input(job, folder, number, index).shape
            groups.setdefault(shape, []).append(index)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _labels(job: CascadeJob, model: Model, indices: Sequence[int]) -> np.ndarray | None:
    if job.labels is None or not model.network.num_classes:
        return None
    return job.labels[np.asarray(indices, int)]


def _generate_batch(
    job: CascadeJob, folder: Path, number: int, model: Model, sampling: Sampling, indices: list[int]
) -> np.ndarray:
    # Filled up with copies: another batch shape is another compiled program, which may round differently.
    size = _batch_size(job, job.stages[number])
    filled = [indices[place % len(indices)] for place in range(size)]
    keys, labels = _keys(job.seed, number, filled), _labels(job, model, filled)
    try:
        if model.network.low_res:
            images = np.stack([_input(job, folder, number, index) for index in indices])
            images = images[np.arange(size) % len(indices)]
            output = model.upscale(images, keys, labels=labels, sampling=sampling)
        else:
            output = model.generate(size, keys, labels=labels, sampling=sampling)
    except FloatingPointError as error:
        raise UserError(f"stage {job.stages[number].title}: {error}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise UserError(
            f"stage {job.stages[number].title} ran out of device memory with {size} images per batch: "
            "use a smaller --batch-size"
        ) from error
    return output[: len(indices)]


def _keys(seed: int, number: int, indices: Sequence[int]) -> Key:
    """One key per image, independent of its batch."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))
