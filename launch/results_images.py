"""The images of docs/results.md: grids that an evaluation has generate_jit, and curves of steps against quality."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results_curve
from PIL import Image
from results_findings import HEADINGS
from results_parts import MAIN, parts

LARGEST = 400_000  # bytes of an image
CURVES = ("lpips", "frechet_alexnet", "frechet_classifier", "top1", "psnr")
CURVE = "Steps against quality: mean over the images of the table."


def draw(result: Mapping[str, Any], out: Path | None, folder: Path) -> None:
    """Write the images of an experiment into docs/images; grids only while its folder is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts(result):
        stem = _stem(result, part.name)
        if "sweep" in part.runs and (panels := curve(part.runs["sweep"])):
            generate_jit = Image.fromarray(results_curve.image(panels, axis="NFE"))
            _write(folder / f"{stem}_curve", generate_jit)
        for file, suffix in (("grid", ""), ("grid_sr3", "_samplers")):
            grid = None if out is None else out / part.name / MAIN / f"{file}.png"
            if grid is not None and grid.is_file():
                with Image.open(grid) as image:
                    _write(folder / f"{stem}{suffix}", image.convert("RGB"))


def shown(result: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """{caption: path} of the images that are there."""
    found = {}
    for part in parts(result):
        label, stem = f" At {part.name}." if part.name else "", _stem(result, part.name)
        found[f"The worst, median and best image by SR3's PSNR, by every method.{label}"] = stem
        found[f"The same images by SR3 at other numbers of steps.{label}"] = f"{stem}_samplers"
        found[f"{CURVE}{label}"] = f"{stem}_curve"
    paths = {caption: sorted(folder.glob(f"{stem}.*")) for caption, stem in found.items()}
    return {caption: f"{folder.name}/{of[0].name}" for caption, of in paths.items() if of}


def _stem(result: Mapping[str, Any], part: str) -> str:
    return f"results_{result['name']}{'_' * bool(part)}{part}"


def curve(run: Mapping[str, Any]) -> dict[str, Any]:
    """The panels of the curve of a sweep, with the regression and bicubic, of the same images, as level lines."""
    panels: dict[str, Any] = {}
    for key in CURVES:
        curves: dict[str, list[tuple[float, float]]] = {}
        lines = {}
        for row in run["rows"]:
            value = row["summary"].get(key, {}).get("mean")
            if value is None or row["method"] == "ground truth":
                continue
            if row["solver"] and not row.get("detail"):
                curves.setdefault(row["solver"], []).append((row["nfe"], value))
            elif not row["solver"]:
                lines[row["method"]] = value
        if curves:
            panels[HEADINGS[key]] = (curves, lines)
    return panels


def _write(stem: Path, image: Image.Image) -> None:
    """PNG, or the best JPEG that is small enough; of very small images every pixel four times."""
    if image.width < 500:
        image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    for old in stem.parent.glob(f"{stem.name}.*"):
        old.unlink()
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    suffix, quality = ".png", 95
    while len(data.getvalue()) > LARGEST and quality > 30:
        data, suffix = io.BytesIO(), ".jpg"
        image.save(data, "JPEG", quality=quality, subsampling=0)
        quality -= 5
    stem.with_suffix(suffix).write_bytes(data.getvalue())
