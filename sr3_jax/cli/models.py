"""List the models that come with the package: sr3 models."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0."""
    rows: list[tuple[str, ...]] = [("NAME", "SCALE", "PARAMETERS", "PRESET", "SAMPLING", "SIZE")]
    rows += [_row(path) for path in sorted(FOLDER.glob("*.safetensors"))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nsr3 upscale --model NAME IMAGE -o OUTPUT; `base` models generate images from noise: sr3 generate --help"
    )
    return 0


def _row(path: Path) -> tuple[str, ...]:
    """The table's row of a model, from the header of its file: no weights are read."""
    from safetensors import safe_open

    from sr3_jax.config.load import complete, migrate
    from sr3_jax.files import parse_json, read_json
    from sr3_jax.sampling import count_steps

    with safe_open(path, framework="numpy") as file:
        config = complete(migrate(parse_json(file.metadata()["config"]))[0])
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, no dict
    sampling = config["sampling"]
    stored = path.with_name(f"{path.stem}.sampling.json")  # of sr3 search-schedule
    if stored.is_file():
        sampling = read_json(stored)["sampling"]
    return (
        path.stem,
        f"{config['data']['scale']}x" if config["model"]["low_res"] else "base",
        f"{count / 1e6:.1f} M",
        _preset_of(config),
        f"{sampling['solver']}, {count_steps(sampling['steps'])}",
        f"{path.stat().st_size / 1e6:.1f} MB",
    )


def _preset_of(config: Mapping[str, Any]) -> str:
    """The preset that describes the same network, diffusion and task; '-' if none does."""
    from sr3_jax.config.load import PRESETS, complete, preset_names

    for name in preset_names():
        preset = importlib.import_module(f"{PRESETS}.{name}").get_config()
        if "stages" not in preset:
            other = complete(preset)
            same_task = all(other["data"][field] == config["data"][field] for field in ("scale", "shrink"))
            same_diffusion = other["diffusion"] | {"lpips": 0} == config["diffusion"] | {
                "lpips": 0
            }  # of the loss only
            if (
                same_task
                and same_diffusion
                and all(other[name] == config[name] for name in ("model", "stage"))
            ):
                return name
    return "-"
