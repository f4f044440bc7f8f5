"""A held-out set through bicubic interpolation and models: scores of every picture, method by method.

Shape legend: H x W an original, h x w its low-res picture, s the scale. Pictures are worked through one at a
time, each by all methods; whatever is finished is kept by `outputs` and not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__, scoring
from sr3_jax.aliases import Key, UserError
from sr3_jax.data.sources import Source
from sr3_jax.model import Model, inference_grid
from sr3_jax.outputs import Outputs, Scores, digest, file_name
from sr3_jax.pictures import PictureError

LONG = 60.0  # seconds


@dataclass(frozen=True, eq=False)
class Method:
    """A way to upscale: one row of the table.

    Attributes:
        name: 'bicubic', or the model's label.
        run: (low_res uint8 [h,w,3], key) -> uint8 [s*h,s*w,3], back on the host.
        identity: plain values that say what `run` is: an output of another identity is another output.
        solver, steps: None where there is no sampler.
        evaluations: how often the network sees the whole picture.
        own: whether the model itself would choose this solver and number of steps.
    """

    name: str
    scale: int
    run: Callable[[np.ndarray, Key], np.ndarray]
    identity: Mapping[str, Any]
    solver: str | None = None
    steps: int | None = None
    evaluations: int = 0
    own: bool = False

    @property
    def folder(self) -> str:
        """Where its outputs are, below the outputs of all."""
        return f"{self.name}/{self.solver}-{self.steps}" if self.solver else f"{self.name}/{self.scale}x"

    @property
    def title(self) -> str:
        """Its name in a picture grid."""
        return f"{self.name} {self.solver} {self.steps} steps" if self.solver else self.name


@dataclass(frozen=True)
class Item:
    """An evaluated picture: its place in the source, its name in files, and its size in the source."""

    index: int
    name: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """scores[m][key] is float64 [pictures, samples] of method m; `failed` holds 'NAME: reason' sentences."""

    items: tuple[Item, ...]
    scores: tuple[Mapping[str, np.ndarray], ...]
    failed: tuple[str, ...]
    reused: int


def bicubic(scale: int) -> Method:
    """The baseline."""

    def run(low_res: np.ndarray, key: Key) -> np.ndarray:
        return scoring.interpolated(low_res, scale)

    return Method("bicubic", scale, run, {"bicubic": scale})


def sampled(
    model: Model, label: str, *, solvers: Sequence[str] = (), steps: Sequence[int] = ()
) -> list[Method]:
    """One method for each solver and number of steps; the model's own where none are given.

    Raises:
        UserError: there is no such solver or number of steps.
    """
    weights = fingerprint(model)
    setup = {name: model.config.get(name) for name in ("model", "diffusion")} | {"scale": model.scale}

    def method(solver: str, count: int) -> Method:
        try:
            inference_grid(model.schedule, count, solver)
        except UserError:
            raise
        except ValueError as error:  # what this schedule cannot do
            raise UserError(
                f"{label} cannot be sampled in {count} steps ({error}): ask for others"
            ) from error

        def run(low_res: np.ndarray, key: Key) -> np.ndarray:
            try:
                return np.asarray(model.upscale(low_res[None], key, steps=count, solver=solver))[0]
            except FloatingPointError as error:  # a figure of a broken output would be no figure
                raise UserError(f"{error} ({solver}, {count} steps)") from error

        identity = {"weights": weights, "config": digest(setup), "solver": solver, "steps": count}
        own = (solver, count) == (model.solver, model.steps)
        return Method(label, model.scale, run, identity, solver, count, evaluations(solver, count), own)

    if model.network.regression:  # one pass, whatever is asked of the others
        one = method(model.solver, 1)
        return [Method(label, model.scale, one.run, one.identity, evaluations=1)]
    return [method(solver, count) for solver in solvers or [model.solver] for count in steps or [model.steps]]


def evaluations(solver: str, steps: int) -> int:
    """How often a sampler calls the network; Heun's method twice a step, but for the last."""
    return 2 * steps - 1 if solver == "heun" else steps


def fingerprint(model: Model) -> str:
    """SHA-256 of the weights: names, shapes, dtypes and bytes, whatever file they came from."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    return digest({jax.tree_util.keystr(path): digest(np.asarray(leaf)) for path, leaf in leaves})


def labels(names: Sequence[str | Path]) -> list[str]:
    """A short name for each model path or name, for tables and folders: the last part, made unique."""
    taken = {"bicubic"}
    return [file_name(Path(name).resolve().name.removesuffix(".safetensors"), taken) for name in names]


def count_outputs(methods: Sequence[Method], *, pictures: int, samples: int) -> int:
    """How many outputs `evaluate` makes."""
    return pictures * sum(samples if method.solver else 1 for method in methods)


def evaluate(
    methods: Sequence[Method],
    source: Source,
    outputs: Path,
    *,
    environment: Mapping[str, Any] | None = None,
    samples: int = 1,
    seed: int = 0,
    limit: int | None = None,
    crop: int | None = None,
    on_output: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Upscale and score the pictures of a source by every method, outputs in the folder `outputs`.

    An output's key follows from the seed, the original's pixels and the sample's number: neither the other
    pictures nor the other methods change it.

    Args:
        environment: plain values besides the method's identity that scores depend on, such as the hardware.
        samples: outputs of each picture and model; bicubic has one.
        limit: the first so many pictures alone.
        crop: the centre of each alone, that many pixels squared.
        on_output: called after each output, found or made.

    Raises:
        UserError: nothing can be evaluated or written.
    """
    # The version stands for the code between the weights and the scores.
    around = {"seed": seed, "version": __version__, **(environment or {})}
    kept = [Outputs(outputs / method.folder, {**method.identity, **around}) for method in methods]
    items: list[Item] = []
    failed: list[str] = []
    values: list[list[list[Scores]]] = [[] for _ in methods]
    taken: set[str] = set()
    compiled: set[tuple[int, tuple[int, ...]]] = set()
    reused = 0
    for index in range(min(len(source), limit or len(source))):
        name = file_name(Path(source.file_name(index)).stem, taken)
        try:
            image = source[index]["image"]
        except PictureError as error:
            failed.append(str(error))
            for _ in range(count_outputs(methods, pictures=1, samples=samples)):
                on_output()
            continue
        items.append(Item(index, name, *image.shape[:2]))
        for number, method in enumerate(methods):
            original = scoring.original_at(image, method.scale, crop)
            about = digest(original)
            low_res: np.ndarray | None = None
            values[number].append([])
            for sample in range(samples if method.solver else 1):
                scores = kept[number].find(name, sample, about)
                reused += scores is not None
                if scores is None:
                    low_res = scoring.low_res_of(original, method.scale) if low_res is None else low_res
                    key = _key(seed, about, sample)
                    warm = (number, low_res.shape) in compiled
                    output, seconds = timed(method.run, low_res, key, warm=warm)
                    compiled.add((number, low_res.shape))
                    scores = scoring.score(output, original, low_res, scale=method.scale) | {
                        "seconds": seconds
                    }
                    kept[number].keep(name, sample, about, output, scores)
                values[number][-1].append(scores)
                on_output()
    if not items:
        raise UserError(f"none of the pictures of {source.name} can be used; the first: {failed[0]}")
    return Evaluation(tuple(items), tuple(_columns(of) for of in values), tuple(failed), reused)


def timed(
    run: Callable[[np.ndarray, Key], np.ndarray], low_res: np.ndarray, key: Key, *, warm: bool
) -> tuple[np.ndarray, float]:
    """The output, and the seconds that it takes once compiled.

    The first call of a size compiles. It is made twice, and the second is timed: nothing else tells the two
    parts apart on every backend. A call of more than LONG seconds is not repeated, since the compiler's few
    seconds are a small part of it. Sizes that were seen before cost one call.
    """
    start = time.perf_counter()
    output = run(low_res, jax.random.clone(key))
    seconds = time.perf_counter() - start
    if not warm and seconds < LONG:
        start = time.perf_counter()
        run(low_res, key)
        seconds = time.perf_counter() - start
    return output, seconds


def _key(seed: int, original: str, sample: int) -> Key:
    key = jax.random.fold_in(jax.random.key(seed), int(original[:8], 16))
    return jax.random.fold_in(key, sample)


def _columns(scores: Sequence[Sequence[Scores]]) -> dict[str, np.ndarray]:
    """From [pictures][samples] of scores to {name: [pictures, samples]}."""
    return {name: np.array([[one[name] for one in row] for row in scores]) for name in scores[0][0]}
