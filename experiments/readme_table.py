#!/usr/bin/env python
"""Measure the shipped model against bicubic on the bundled test photographs and write the tables of README.md.

    python experiments/readme_table.py                # measure: docs/models/photo_4x_readme.json, then the tables
    python experiments/readme_table.py --tables-only  # the tables from the committed JSON

The model is sampled with its default sampler and seed 0 on clean low-res images (its training task), and on low-res
images with JPEG compression or noise, which it was not trained on. LPIPS needs the `metrics` extra.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sr3_jax
from sr3_jax.features.lpips import load_lpips
from sr3_jax.image_ops import degrade, to_uint8, to_unit, upsample
from sr3_jax.metrics import consistency, psnr, ssim

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "sr3_jax" / "data" / "photos" / "test"
NUMBERS = ROOT / "docs" / "models" / "photo_4x_readme.json"
README = ROOT / "README.md"
SCALE = 4


def jpeg(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    """Compress uint8 [h,w,3] as JPEG with 4:2:0 chroma and decode it again."""

    def apply(low_res: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(low_res).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        return np.asarray(Image.open(buffer))

    return apply


def noise(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    """Add Gaussian noise of `sigma` levels of 255 to uint8 [h,w,3]."""

    def apply(low_res: np.ndarray) -> np.ndarray:
        noisy = low_res + np.random.default_rng(0).normal(0.0, sigma, low_res.shape)
        return np.clip(np.round(noisy), 0, 255).astype(np.uint8)

    return apply


INPUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clean": lambda low_res: low_res,
    "JPEG, quality 90": jpeg(90),
    "JPEG, quality 50": jpeg(50),
    "noise, sigma 5/255": noise(5),
    "noise, sigma 15/255": noise(15),
}


def measure() -> list[dict[str, Any]]:
    """One row for each input and method: means over the photographs of PSNR, SSIM, LPIPS and consistency (1e-5)."""
    model, lpips = sr3_jax.load("photo_4x"), load_lpips()
    rows = []
    for kind, corrupt in INPUTS.items():
        values: dict[str, list[list[float]]] = {"bicubic": [], "photo_4x": []}
        for path in sorted(PHOTOS.glob("*.jpg")):
            ground_truth = np.asarray(Image.open(path).convert("RGB"))
            height, width = (side // SCALE * SCALE for side in ground_truth.shape[:2])
            ground_truth = ground_truth[None, :height, :width]
            clean = np.asarray(to_uint8(degrade(to_unit(ground_truth), SCALE)))
            low_res = corrupt(clean[0])[None]
            outputs = {
                "bicubic": np.asarray(to_uint8(upsample(to_unit(low_res), SCALE))),
                "photo_4x": model.upscale(low_res, seed=0),
            }
            for method, output in outputs.items():
                metrics = (
                    psnr(output, ground_truth),
                    ssim(output, ground_truth),
                    lpips.distance(output, ground_truth),
                )
                values[method].append([float(m[0]) for m in (*metrics, consistency(output, low_res))])
        for method, rows_of_method in values.items():
            means = np.mean(rows_of_method, axis=0)
            names = ("psnr", "ssim", "lpips", "consistency")
            rows.append({"input": kind, "method": method, **dict(zip(names, map(float, means), strict=True))})
    return rows


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """The two methods on clean inputs, as Markdown."""
    lines = [
        "| method | PSNR (dB) ↑ | SSIM ↑ | LPIPS ↓ | consistency (1e-5) ↓ |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["input"] == "clean":
            cells = (
                f"{row['psnr']:.2f}",
                f"{row['ssim']:.3f}",
                f"{row['lpips']:.3f}",
                f"{row['consistency']:.1f}",
            )
            lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def limits_table(rows: Sequence[dict[str, Any]]) -> str:
    """PSNR and LPIPS of the two methods for each kind of input, as Markdown."""
    lines = [
        "| low-res input | PSNR ↑, bicubic | PSNR ↑, photo_4x | LPIPS ↓, bicubic | LPIPS ↓, photo_4x |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in INPUTS:
        of = {row["method"]: row for row in rows if row["input"] == kind}
        cells = [f"{of[method]['psnr']:.2f}" for method in ("bicubic", "photo_4x")]
        cells += [f"{of[method]['lpips']:.3f}" for method in ("bicubic", "photo_4x")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def replace(text: str, name: str, content: str) -> str:
    """`text` with `content` between the comments `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{content}\n{end}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{README} must have one pair of {begin} and {end}, found {count}")
    return replaced


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables-only", action="store_true", help="write the tables from the committed numbers"
    )
    if not parser.parse_args().tables_only:
        NUMBERS.write_text(json.dumps({"rows": measure()}, indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {NUMBERS.relative_to(ROOT)}")
    rows = json.loads(NUMBERS.read_text(encoding="utf-8"))["rows"]
    text = README.read_text(encoding="utf-8")
    text = replace(text, "quality", quality_table(rows))
    README.write_text(replace(text, "limits", limits_table(rows)), encoding="utf-8")
    print(f"Wrote the tables of {README.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
