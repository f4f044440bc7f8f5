"""Measures the small cascade of docs/cascade.md: class accuracy and Fréchet distance of each stage's images.

    python -m experiments.measure_cascade OUT --classifier fashion_mnist_32.safetensors -o docs/cascade/measured.json

OUT is the folder of `experiments/cascade.sh`: OUT/cascade holds the three stages, OUT/plain the SR stages trained
without conditioning augmentation. Each chain generates the same number of images of every class, with seed 0.
Fréchet distances are in the classifier's features, to as many real test images. Augmentation strength and guidance are
selected by the distance to training images, so that the selection does not flatter the results; they are printed as
options of `sr3 cascade`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tables import cascade_options, write_json
from sr3_jax import __version__
from sr3_jax.data.sources import open_source
from sr3_jax.distributed.processes import hardware
from sr3_jax.errors import UserError
from sr3_jax.evaluation.results import bootstrap
from sr3_jax.features.classifiers import correct, load_classifier
from sr3_jax.features.statistics import frechet_distance, statistics_of
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.inference.loading import load
from sr3_jax.inference.model import Model
from sr3_jax.inference.sampling_file import params_fingerprint
from sr3_jax.train.checkpoints import read_config
from sr3_jax.train.metric_writer import read_metrics

CLASSES, SIZE = 10, 32
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5)
BATCH = 100
Stages = Mapping[str, Model]


def in_batches(count: int, sample: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """All images of a function of indices, computed in batches of BATCH."""
    return np.concatenate([sample(np.arange(start, start + BATCH)) for start in range(0, count, BATCH)])


def keys(number: int, indices: np.ndarray) -> jax.Array:
    """One key per image of a stage, the same as those of `sr3 cascade --seed 0`."""
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.asarray(indices, jnp.uint32))


def upscaled(model: Model, images: np.ndarray, number: int, strength: float) -> np.ndarray:
    """The outputs of an SR stage at an augmentation strength of its condition."""
    sampling = dataclasses.replace(model.sampling, augment=strength)
    return in_batches(
        len(images), lambda indices: model.upscale(images[indices], keys(number, indices), sampling=sampling)
    )


def generated(model: Model, labels: np.ndarray, guidance: float) -> np.ndarray:
    """The outputs of the base stage."""
    sampling = dataclasses.replace(model.sampling, guidance=guidance)
    return in_batches(
        len(labels),
        lambda indices: model.generate(BATCH, keys(0, indices), labels=labels[indices], sampling=sampling),
    )


def real_images(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a data source, equally many of each class, in the order 0, 1, ..., 9, 0, ..."""
    source = open_source(name)
    found: dict[int, list[np.ndarray]] = {label: [] for label in range(CLASSES)}
    for index in range(len(source)):
        item = source[index]
        if len(found[item["label"]]) < count // CLASSES:
            found[item["label"]].append(item["image"])
    if min(map(len, found.values())) < count // CLASSES:
        raise UserError(f"--count={count}: {name} has fewer than {count // CLASSES} images of some class")
    images = np.stack([found[index % CLASSES][index // CLASSES] for index in range(count)])
    return images, np.arange(count) % CLASSES


def downscaled(images: np.ndarray, factor: int) -> np.ndarray:
    """Real images downscaled as in training: by bicubic interpolation, a factor of 2 at a time."""
    return (
        images if factor == 1 else np.asarray(to_uint8(degrade(to_unit(downscaled(images, factor // 2)), 2)))
    )


def training(workdir: Path) -> dict[str, Any]:
    """Steps, batch size and minutes of training from the log, without evaluation, checkpoints and compilation."""
    config = read_config(workdir)
    rows = [row for row in read_metrics(workdir) if "step_ms" in row]
    steps = np.diff([0, *(row["step"] for row in rows)])
    return {
        "steps": rows[-1]["step"],
        "batch_size": config["train"]["batch_size"],
        "minutes": float(sum(steps * [row["step_ms"] for row in rows])) / 60_000,
    }


@dataclass(frozen=True)
class Reference:
    """The real images that generated images are compared with.

    Attributes:
        classifier: of real images at 32x32.
        labels: [N] the classes that images are generated for.
        features: {'frechet': of test images, 'frechet_choice': of training images}, each {downscaling factor: [N,F]}.
    """

    classifier: Any
    labels: np.ndarray
    features: Mapping[str, Mapping[int, np.ndarray]]

    def row(self, group: str, images: np.ndarray, **facts: Any) -> dict[str, Any]:
        """One row of the results: accuracy and distances of images uint8 [N,H,H,3]."""
        correctly = correct(self.classifier.logits(images), self.labels).astype(np.float64)
        own = statistics_of(self.classifier.features(images), self.classifier.protocol)
        factor = SIZE // images.shape[1]
        distances = {
            name: frechet_distance(own, statistics_of(features[factor], self.classifier.protocol))
            for name, features in self.features.items()
        }
        row = {
            "group": group,
            **facts,
            "size": images.shape[1],
            "accuracy": bootstrap(correctly),
            **distances,
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def chain_rows(
    reference: Reference,
    stages: Stages,
    plain: Stages,
    origin: str,
    small: np.ndarray,
    strengths: Sequence[float],
) -> list[dict[str, Any]]:
    """Rows of 8x8 images upscaled twice: by the stages at each strength, and by those without augmentation."""
    rows = []
    for models, strength in [(stages, strength) for strength in strengths] + [(plain, 0.0)]:
        for images in upscaled_twice(models, small, strength):
            facts = {"origin": origin, "augmented": models is stages, "strength": strength}
            rows.append(reference.row("chain", images, **facts))
    return rows


def upscaled_twice(stages: Stages, small: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """8x8 images at 16x16 and at 32x32."""
    middle = upscaled(stages["sr_16"], small, 1, strength)
    return middle, upscaled(stages["sr_32"], middle, 2, strength)


def best(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """A column's value in the 32x32 row with the smallest distance to training images."""
    return min((row for row in rows if row["size"] == SIZE), key=lambda row: row["frechet_choice"])[column]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements as plain values."""
    started = time.perf_counter()
    classifier: Any = load_classifier(args.classifier)
    real, labels = real_images(args.data, args.count)
    train, _ = real_images(args.train_data, args.count)
    features = {
        name: {factor: classifier.features(downscaled(images, factor)) for factor in (1, 2, 4)}
        for name, images in (("frechet", real), ("frechet_choice", train))
    }
    reference = Reference(classifier, labels, features)
    stages = {name: load(args.out / "cascade" / name) for name in ("base", "sr_16", "sr_32")}
    plain = {name: load(args.out / "plain" / name) for name in ("sr_16", "sr_32")}

    rows = [reference.row("real", downscaled(train, factor)) for factor in (4, 2, 1)]  # for comparison
    base = {level: generated(stages["base"], labels, level) for level in args.guidance}
    rows += [reference.row("base", images, guidance=level) for level, images in base.items()]
    chains = chain_rows(reference, stages, plain, "generated", base[1.0], args.strengths)
    strength = best([row for row in chains if row["augmented"]], "strength")
    rows += chains + chain_rows(reference, stages, plain, "real", downscaled(real, 4), args.strengths)
    swept = [
        reference.row("guidance", images, guidance=level, strength=strength)
        for level, small in base.items()
        for images in upscaled_twice(stages, small, strength)
    ]
    rows += swept
    fingerprints = {name: params_fingerprint(model.params) for name, model in stages.items()}
    fingerprints |= {f"plain {name}": params_fingerprint(model.params) for name, model in plain.items()}
    return {
        "rows": rows,
        "training": {name: training(args.out / "cascade" / name) for name in stages},
        "count": args.count,
        "data": args.data,
        "guidance": best(swept, "guidance"),
        "strength": strength,
        "classifier": {"file": Path(args.classifier).name, "sha256": classifier.sha256},
        "stages": fingerprints,
        "samplers": {
            name: f"{model.sampling.solver} {model.sampling.steps}" for name, model in stages.items()
        },
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
        "--data", default="tfds:fashion_mnist_32:test", help="real test images (default: %(default)s)"
    )
    parser.add_argument(
        "--train-data",
        default="tfds:fashion_mnist_32:train",
        help="real training images (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=int, default=1000, help="images per measurement (default: %(default)s)"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE, help="must contain 1")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.count % BATCH or args.count < BATCH:
        parser.error(f"--count must be a positive multiple of {BATCH}, got {args.count}")
    try:
        found = measure(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    write_json(args.output, found)
    print(cascade_options(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
