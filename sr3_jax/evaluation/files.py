"""The files of an evaluation: evaluation.json with everything, its tables as Markdown and CSV, image grids."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr3_jax import __version__
from sr3_jax.data.sources import Source
from sr3_jax.evaluation import showcase, tables
from sr3_jax.evaluation.methods import Method, bicubic, fingerprint
from sr3_jax.evaluation.outputs import Outputs
from sr3_jax.evaluation.parts import Evaluation, Item
from sr3_jax.evaluation.scoring import low_res_of, original_at
from sr3_jax.files import to_json, write_text
from sr3_jax.image_io.image_file import DecodedImage, read_rgb, write_image
from sr3_jax.inference.model import Model

FORMAT = "sr3_jax.evaluation.1"


def hardware() -> str:
    """What computes in this process, in words."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, {jax.local_device_count()} of them"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} core{'s' * (cores != 1)}"


def describe_model(model: Model, label: str, *, labelled: bool = False) -> dict[str, Any]:
    """A model's part of evaluation.json; `labelled`: whether the images' labels are given to models of classes."""
    return {
        "label": label,
        "name": model.name,
        "scale": model.scale,
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(model.params)),
        "sha256": fingerprint(model),
        "labelled": bool(labelled and model.network.num_classes),
        "config": model.config,
    }


def assemble(
    evaluation: Evaluation,
    methods: Sequence[Method],
    models: Sequence[Mapping[str, Any]],
    *,
    source: str,
    samples: int,
    seed: int,
    crop: int | None,
    seconds: float,
    command: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """evaluation.json as plain values.

    Args:
        models: by `describe_model`.
        seconds: wall time of the run.
        more: the rest of the protocol, as `evaluation_setup.Setup.describe` says it.
    """
    names = [item.name for item in evaluation.items]
    rows = [
        {
            "method": method.name,
            "scale": method.scale,
            "solver": method.solver,
            "steps": method.steps,
            "detail": method.detail,
            "evaluations": method.evaluations,
            "own": method.own,
            "summary": {key: to_json(of) for key, of in {**tables.summary(scores), **sets}.items()},
            "images": {
                name: {
                    key: [to_json({key: float(value)})[key] for value in of[number]]
                    for key, of in scores.items()
                }
                for number, name in enumerate(names)
            },
        }
        for method, scores, sets in zip(methods, evaluation.scores, evaluation.sets, strict=True)
    ]
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seconds": round(seconds, 1),
        "outputs_reused": evaluation.reused,
        "hardware": hardware(),
        "versions": {"sr3_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "protocol": {
            "source": source,
            "images": len(names),
            "samples": samples,
            "seed": seed,
            "crop": crop,
            **more,
        },
        "models": list(models),
        "images": [
            {"name": item.name, "height": item.height, "width": item.width} for item in evaluation.items
        ],
        "failed": list(evaluation.failed),
        "rows": rows,
    }
    report["protocol"]["sentences"] = tables.protocol(report)
    return report


def write_tables(folder: Path, report: Mapping[str, Any]) -> None:
    """evaluation.json, evaluation.md and evaluation.csv.

    Raises:
        UserError: one can't be written.
    """
    write_text(folder / "evaluation.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(folder / "evaluation.md", tables.markdown(report))
    write_text(folder / "evaluation.csv", tables.comma_separated(report))


def by_model(methods: Sequence[Method]) -> dict[str, list[int]]:
    """The numbers of each model's methods."""
    groups: dict[str, list[int]] = {}
    for number, method in enumerate(methods):
        if method.evaluations:
            groups.setdefault(method.name, []).append(number)
    return groups


def representative(methods: Sequence[Method], numbers: Sequence[int]) -> int:
    """Of a model's methods the one to show: its own sampler, else the first of those with the most steps."""
    return max(numbers, key=lambda number: (methods[number].own, methods[number].steps or 0))


def write_grids(
    folder: Path, evaluation: Evaluation, methods: Sequence[Method], source: Source, *, crop: int | None
) -> list[Path]:
    """grid.png: the worst, median and best image by PSNR of the first model, by every model.

    Each model is shown, and the first one judged, by its `representative`. A model of several solvers or
    numbers of steps has a grid of its own, grid_LABEL.png, with all of them.
    """
    groups = by_model(methods)
    shown = [representative(methods, numbers) for numbers in groups.values()]
    psnr = evaluation.scores[shown[0]]["psnr"].mean(axis=1)
    picks = showcase.chosen(psnr)
    plans = {"grid.png": shown}
    plans |= {f"grid_{name}.png": numbers for name, numbers in groups.items() if len(numbers) > 1}
    written = []
    for file, numbers in plans.items():
        group = [methods[number] for number in numbers]
        scales = list(dict.fromkeys(method.scale for method in group))
        rows = {}
        for case, place in picks.items():
            item = evaluation.items[place]
            title = f"{case}:\n{item.name}\n{tables.figure(float(psnr[place]), 2)} dB"
            rows[title] = _cells(folder, item, group, scales, source, crop)
        image = showcase.grid(rows, scales=scales, output_titles=[method.title for method in group])
        write_image(folder / file, DecodedImage(image))
        written.append(folder / file)
    return written


def _cells(
    folder: Path,
    item: Item,
    methods: Sequence[Method],
    scales: Sequence[int],
    source: Source,
    crop: int | None,
) -> list[np.ndarray]:
    image = source[item.index]["image"]
    originals = {scale: original_at(image, scale, crop) for scale in scales}
    low_res = {scale: low_res_of(original[None], scale)[0] for scale, original in originals.items()}
    enlarged = {scale: bicubic(scale) for scale in scales}

    def output(method: Method) -> np.ndarray:
        return read_rgb(Outputs(folder / "outputs" / method.folder, {}).path(item.name, 0))

    return showcase.grid_row(
        originals[scales[0]],
        low_res,
        {scale: output(method) for scale, method in enlarged.items()},
        [output(method) for method in methods],
    )


def _processor() -> str:
    """The processor's name; Python itself does not know it on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()
