#!/usr/bin/env python
"""Which solver suits which prediction: short trainings of one network, sampled with every solver.

    python experiments/solver_by_prediction.py -o docs/results/solver_by_prediction.json --workdir out/by_prediction

Trains `photos_4x_small` on the bundled photographs with each prediction and several seeds, and measures each solver on
center crops of the bundled test photographs, and then with `photo_4x`, a y0 network that was trained for hours. A run
that is finished is not repeated; `python -m experiments.pages results` writes the tables into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sr3_jax
from sr3_jax import metrics
from sr3_jax.data.batches import center_crops
from sr3_jax.data.sources import open_source
from sr3_jax.diffusion import PREDICTIONS
from sr3_jax.distributed.processes import hardware
from sr3_jax.features.lpips import load_lpips
from sr3_jax.image_ops import degrade, to_uint8, to_unit
from sr3_jax.sampling import Sampling

TRAINING = {
    "model.output_skip": 0,  # only for y0
    "train.batch_size": 8,
    "data.crop": 32,
    "optim.decay": "cosine",
    "eval.every": 1_000_000,
    "train.log_every": 100,
}


def train(workdir: Path, prediction: str, seed: int, num_steps: int) -> None:
    """One run of `sr3 train`; continued if it was interrupted."""
    fields = TRAINING | {
        "diffusion.prediction": prediction, "train.seed": seed, "train.num_steps": num_steps
    }  # fmt: skip
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "-m", "sr3_jax", "train", "--config=photos_4x_small", f"--workdir={workdir}"]
    subprocess.run([*command, *options], check=True)


def measure(path: Path | str, images: np.ndarray, steps: list[int]) -> list[dict[str, Any]]:
    """PSNR and LPIPS of each solver and number of steps, without back-projection."""
    model, lpips = sr3_jax.load(path), load_lpips()
    low_res = np.asarray(to_uint8(degrade(to_unit(images), 4)))
    rows = []
    for solver in ("ancestral", "ddpm", "ddim", "dpmpp_2m", "heun"):
        for count in steps:
            output = model.upscale(low_res, sampling=Sampling(solver, count))
            rows.append(
                {
                    "solver": solver,
                    "steps": count,
                    "psnr": float(np.mean(metrics.psnr(output, images))),
                    "lpips": float(np.mean(lpips.distance(output, images))),
                }
            )
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each solver and number of steps, the range over seeds for each prediction, and photo_4x."""
    predictions = list(dict.fromkeys(run["prediction"] for run in report["runs"]))
    heading = " | ".join(f"{name}: PSNR | {name}: LPIPS" for name in [*predictions, "photo_4x"])
    lines = [f"| solver | steps | {heading} |", "|:---|---:|" + "---:|" * 2 * (len(predictions) + 1)]
    for first in report["photo_4x"]:
        cells = []
        for prediction in predictions:
            for metric, digits in (("psnr", 1), ("lpips", 3)):
                values = [
                    row[metric]
                    for run in report["runs"]
                    for row in run["rows"]
                    if run["prediction"] == prediction
                    and (row["solver"], row["steps"]) == (first["solver"], first["steps"])
                ]
                cells.append(f"{min(values):.{digits}f} to {max(values):.{digits}f}")
        cells += [f"{first['psnr']:.1f}", f"{first['lpips']:.3f}"]
        lines.append(f"| {first['solver']} | {first['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--num-steps", type=int, default=500, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", default="5,10,25,100", help="sampling steps")
    args = parser.parse_args()
    images = center_crops(open_source("photos:test"), crop=128, count=8)["image"]
    report: dict[str, Any] = {
        "command": "python experiments/solver_by_prediction.py -o docs/results/solver_by_prediction.json "
        f"--workdir out/by_prediction --num-steps {args.num_steps} --seeds {args.seeds} --steps {args.steps}",
        "date": date.today().isoformat(),
        "versions": {"sr3_jax": sr3_jax.__version__, "jax": jax.__version__},
        "hardware": hardware(),
        "training": TRAINING,
        "images": len(images),
        "runs": [],
    }
    steps = [int(count) for count in args.steps.split(",")]
    report["photo_4x"] = measure("photo_4x", images, steps)
    for seed in range(args.seeds):
        for prediction in PREDICTIONS:
            workdir = args.workdir / f"{prediction}_{seed}"
            train(workdir, prediction, seed, args.num_steps)
            rows = measure(workdir, images, steps)
            report["runs"].append({"prediction": prediction, "seed": seed, "rows": rows})
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
