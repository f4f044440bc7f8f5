#!/usr/bin/env python
"""Measures the small cascade for docs/cascade.md: labels that a classifier recognises, and distances to real pictures.

    python launch/cascade_measure.py OUT --classifier fashion_mnist_32.safetensors -o docs/cascade/measured.json

OUT is what `launch/cascade.sh OUT` leaves: OUT/cascade with the three stages and OUT/plain with the SR stages trained
without augmentation of their condition. Pictures are drawn by each chain, seed 0, as many of each class; distances are
Frechet distances in the classifier's features to as many real test pictures. Guidance and strength are chosen by the
distance to training pictures, so that the choice does not flatter the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr3_jax import __version__
from sr3_jax.aliases import UserError
from sr3_jax.checkpoint import read_config
from sr3_jax.data.sources import open_source
from sr3_jax.evaluation.files import hardware
from sr3_jax.evaluation.tables import bootstrap
from sr3_jax.features.recognition import correct, load_classifier
from sr3_jax.features.statistics import frechet_distance, statistics_of
from sr3_jax.images import degrade, to_uint8, to_unit
from sr3_jax.model import Model, load
from sr3_jax.report import read_metrics
from sr3_jax.sampling import fingerprint

CLASSES, SIZE = 10, 32
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5)
BATCH = 100


def in_batches(count: int, draw: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """All pictures of a function of indices, BATCH at a time."""
    return np.concatenate([draw(np.arange(start, start + BATCH)) for start in range(0, count, BATCH)])


def keys(number: int, indices: np.ndarray) -> jax.Array:
    """A key for each picture of a stage: `sr3 cascade --seed 0` has the same."""
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))


def enlarged(model: Model, images: np.ndarray, number: int, strength: float) -> np.ndarray:
    """An SR stage at a strength of its condition's augmentation."""
    sampling = dataclasses.replace(model.sampling, augment=strength)
    return in_batches(
        len(images), lambda indices: model.upscale(images[indices], keys(number, indices), sampling=sampling)
    )


def generated(model: Model, labels: np.ndarray, guidance: float) -> np.ndarray:
    """The base stage."""
    sampling = dataclasses.replace(model.sampling, guidance=guidance)
    return in_batches(
        len(labels),
        lambda indices: model.generate(BATCH, keys(0, indices), labels=labels[indices], sampling=sampling),
    )


def real_pictures(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pictures of each class, class by class in turn, as `labels` are."""
    source = open_source(name)
    found: dict[int, list[np.ndarray]] = {label: [] for label in range(CLASSES)}
    for index in range(len(source)):
        item = source[index]
        if len(found[item["label"]]) < count // CLASSES:
            found[item["label"]].append(item["image"])
    if min(map(len, found.values())) < count // CLASSES:
        raise UserError(f"{name} has too few pictures of some class for --count={count}: lower it")
    images = np.stack([found[index % CLASSES][index // CLASSES] for index in range(count)])
    return images, np.arange(count) % CLASSES


def smaller(images: np.ndarray, factor: int) -> np.ndarray:
    """Real pictures as the stages see them: by the one bicubic, step by step."""
    return images if factor == 1 else np.asarray(to_uint8(degrade(to_unit(smaller(images, factor // 2)), 2)))


def training(workdir: Path) -> dict[str, Any]:
    """How long a stage was trained, by its log: evaluation, checkpoints and compilation not counted."""
    config = read_config(workdir)
    rows = [row for row in read_metrics(workdir) if "step_ms" in row]
    steps = np.diff([0, *(row["step"] for row in rows)])
    return {
        "steps": rows[-1]["step"],
        "batch_size": config["train"]["batch_size"],
        "minutes": float(sum(steps * [row["step_ms"] for row in rows])) / 60_000,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain values."""
    started = time.perf_counter()
    classifier: Any = load_classifier(args.classifier)
    real, labels = real_pictures(args.data, args.count)
    other, _ = real_pictures(args.train_data, args.count)
    references = {
        name: {factor: classifier.features(smaller(pictures, factor)) for factor in (1, 2, 4)}
        for name, pictures in (("frechet", real), ("frechet_choice", other))
    }

    def told(images: np.ndarray) -> dict[str, Any]:
        factor = SIZE // images.shape[1]
        accuracy = bootstrap(correct(classifier.logits(images), labels).astype(np.float64))
        own = statistics_of(classifier.features(images), classifier.protocol)
        distances = {
            name: frechet_distance(own, statistics_of(reference[factor], classifier.protocol))
            for name, reference in references.items()
        }
        return {"size": images.shape[1], "accuracy": accuracy, **distances}

    names = ("base", "sr_16", "sr_32")
    stages = {name: load(args.out / "cascade" / name) for name in names}
    plain = {name: load(args.out / "plain" / name) for name in names[1:]}
    rows: list[dict[str, Any]] = []

    def add(group: str, images: np.ndarray, **facts: Any) -> np.ndarray:
        rows.append({"group": group, **facts, **told(images)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        return images

    for factor in (4, 2, 1):  # what can be had at each size: other real pictures
        add("real", smaller(other, factor), chain="other real pictures")
    first = {
        level: add("base", generated(stages["base"], labels, level), guidance=level)
        for level in args.guidance
    }
    eights = {"drawn": first[1.0], "real": smaller(real, 4)}
    for origin, small in eights.items():
        for strength in args.strengths:
            middle = enlarged(stages["sr_16"], small, 1, strength)
            last = enlarged(stages["sr_32"], middle, 2, strength)
            for images in (middle, last):
                add("chain", images, origin=origin, augmented=True, strength=strength)
        middle = enlarged(plain["sr_16"], small, 1, 0.0)
        for images in (middle, enlarged(plain["sr_32"], middle, 2, 0.0)):
            add("chain", images, origin=origin, augmented=False, strength=0.0)
    chosen = [
        row for row in rows if row["group"] == "chain" and row["origin"] == "drawn" and row["augmented"]
    ]
    strength = min((row for row in chosen if row["size"] == SIZE), key=lambda row: row["frechet_choice"])[
        "strength"
    ]
    for level, small in first.items():  # the sweep of guidance, through the whole cascade
        middle = enlarged(stages["sr_16"], small, 1, strength)
        for images in (middle, enlarged(stages["sr_32"], middle, 2, strength)):
            add("guidance", images, guidance=level, strength=strength)
    swept = [row for row in rows if row["group"] == "guidance" and row["size"] == SIZE]
    best = min(swept, key=lambda row: row["frechet_choice"])["guidance"]
    return {
        "rows": rows,
        "training": {name: training(args.out / "cascade" / name) for name in names},
        "count": args.count,
        "data": args.data,
        "guidance": best,
        "strength": strength,
        "classifier": {"file": Path(args.classifier).name, "sha256": classifier.sha256},
        "stages": {
            **{name: fingerprint(model.params) for name, model in stages.items()},
            **{f"plain {name}": fingerprint(model.params) for name, model in plain.items()},
        },
        "samplers": {name: f"{model.solver} {model.steps}" for name, model in stages.items()},
        "hardware": hardware(),
        "seconds": round(time.perf_counter() - started),
        "versions": {"sr3_jax": __version__, "jax": jax.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--classifier", required=True)
    parser.add_argument(
        "--data", default="tfds:fashion_mnist_32:test", help="real pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--train-data", default="tfds:fashion_mnist_32:train", help="others (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=1000, help="pictures (default: %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.count % BATCH or args.count < BATCH:
        parser.error(f"--count={args.count} must be a multiple of {BATCH}")
    try:
        found = measure(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
