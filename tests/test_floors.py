"""The house stands: every file imports from strictly lower floors, and each library stays in its rooms.

The imports are read from the source, so that nothing is run and an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 300  # lines; a room that grows past it is two rooms

# The floor of every file of sr3_jax/. A new file is put here, as low as its imports allow.
FLOORS = {
    "__init__.py": 0,
    "aliases.py": 0,
    "signals.py": 0,
    "augment.py": 1,
    "files.py": 1,
    "images.py": 1,
    "metrics.py": 1,
    "parallel.py": 1,
    "processes.py": 1,
    "report.py": 2,
    "checkpoint.py": 3,
    "parts.py": 3,
    "sampling.py": 3,
    "draw.py": 4,
    "fields.py": 4,
    "experiment.py": 5,
    "model.py": 5,
    "upscale.py": 5,
    "stages.py": 6,
    "cascade.py": 7,
    "page.py": 8,
    "images/errors.py": 0,
    "images/metadata.py": 0,
    "images/pixels.py": 0,
    "images/image.py": 1,
    "images/jobs.py": 2,
    "diffusion/guidance.py": 1,
    "diffusion/process.py": 1,
    "diffusion/schedule.py": 1,
    "diffusion/space.py": 1,
    "diffusion/tiling.py": 1,
    "diffusion/loss.py": 2,
    "diffusion/solvers.py": 2,
    "diffusion/sampler.py": 3,
    "nn/blocks.py": 1,
    "nn/classifier.py": 2,
    "nn/unet.py": 2,
    "data/folders.py": 1,
    "data/photos/builder.py": 1,
    "data/store.py": 1,
    "data/sources.py": 2,
    "data/batches.py": 3,
    "data/crops.py": 3,
    "data/prepare.py": 3,
    "train/window.py": 1,
    "train/examples.py": 2,
    "train/optim.py": 2,
    "train/state.py": 2,
    "train/step.py": 3,
    "train/best.py": 4,
    "train/heldout.py": 5,
    "train/loop.py": 6,
    "features/inception_layers.py": 1,
    "features/weights.py": 1,
    "features/lpips.py": 2,
    "features/onnx.py": 2,
    "features/statistics.py": 2,
    "features/classifier.py": 3,
    "features/figures.py": 3,
    "features/inception.py": 3,
    "features/kept.py": 3,
    "features/substitute.py": 3,
    "features/linear.py": 4,
    "features/networks.py": 4,
    "features/training.py": 4,
    "features/recognition.py": 5,
    "evaluation/tables.py": 1,
    "evaluation/outputs.py": 2,
    "evaluation/scoring.py": 2,
    "evaluation/showcase.py": 2,
    "evaluation/measures.py": 3,
    "evaluation/parts.py": 4,
    "evaluation/bench.py": 5,
    "evaluation/meters.py": 6,
    "evaluation/methods.py": 6,
    "evaluation/evaluate.py": 7,
    "evaluation/files.py": 7,
    "search/races.py": 4,
    "search/scores.py": 6,
    "search/inputs.py": 7,
    "search/report.py": 7,
    "planning/counting.py": 1,
    "planning/hlo.py": 1,
    "planning/text.py": 1,
    "planning/topologies.py": 1,
    "planning/costs.py": 2,
    "planning/verdict.py": 2,
    "planning/cache.py": 3,
    "planning/plan.py": 6,
    "cli/_options.py": 8,
    "cli/_drawing.py": 9,
    "cli/": 10,  # every command, and main, which finds them by name
    "__main__.py": 11,
}

# Libraries that only some rooms, and the tests, may import; no room at all: nobody may. "/" ends a folder.
ROOMS_OF = {
    "flax.linen": ("sr3_jax/nn/",),
    "flax.nnx": (),
    "orbax": ("sr3_jax/train/checkpoints.py",),
    "tensorflow_datasets": ("sr3_jax/data/",),
    "grain": ("sr3_jax/data/",),
    "array_record": ("sr3_jax/data/",),
    "ml_collections": ("sr3_jax/config/experiment.py", "configs/"),
    "torch": (),
    "torchvision": (),
    "tensorflow": (),
    "clu": (),
}
STANDARD = sys.stdlib_module_names
CORE_LIBRARIES = {"jax", "numpy"}
CORE_NEVER = {"logging", "os", "pathlib", "io", "shutil"}  # no files, no logging in diffusion/


def _inside(path: str, rooms: tuple[str, ...]) -> bool:
    return any(path.startswith(room) if room.endswith("/") else path == room for room in rooms)


def _floor(path: str) -> int | None:
    """The floor of 'sr3_jax/...py'; an empty package's door, __init__.py, lies on the ground."""
    room = path.removeprefix("sr3_jax/")
    if room in FLOORS:
        return FLOORS[room]
    if Path(room).name == "__init__.py":
        return 0
    return FLOORS.get(room.split("/")[0] + "/")


def _imports(path: str, source: str) -> list[tuple[int, str, str | None]]:
    """(line, module, name) of `import module` (name None) and of `from module import name`, made absolute."""
    found: list[tuple[int, str, str | None]] = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = Path(path).parts[: -node.level]
                module = ".".join([*package, *([module] if module else [])])
            found += [(node.lineno, module, alias.name) for alias in node.names]
    return found


def _target(module: str, name: str | None, files: set[str]) -> str | None:
    """The file of sr3_jax that an import brings in; None if there is no such file."""
    whole = module.replace(".", "/")
    candidates = [f"{whole}/{name}.py", f"{whole}/{name}/__init__.py"] if name else []
    candidates += [f"{whole}.py", f"{whole}/__init__.py"]
    return next((path for path in candidates if path in files), None)


def violations(path: str, source: str, files: set[str]) -> list[str]:
    """What is wrong with the imports of one file; `path` and `files` are relative to the repository."""
    wrong = []
    floor = _floor(path) if path.startswith("sr3_jax/") else None
    if path.startswith("sr3_jax/") and floor is None:
        wrong.append(f"{path}: has no floor: put it into FLOORS")
    if path.startswith(("sr3_jax/", "configs/")) and source.count("\n") > LONGEST_FILE:
        wrong.append(f"{path}: is longer than {LONGEST_FILE} lines: make two rooms of it")
    for line, module, name in _imports(path, source):
        where = f"{path}:{line}"
        top = module.split(".")[0]
        full = f"{module}.{name}" if name else module
        for library, rooms in ROOMS_OF.items():
            allowed = _inside(path, (*rooms, "tests/")) if rooms else False  # a test may look at any room
            if (full == library or full.startswith(library + ".")) and not allowed:
                wrong.append(f"{where}: imports {library}, which only {', '.join(rooms) or 'nobody'} may")
        if full == "flax" and not path.startswith(("sr3_jax/nn/", "tests/")):
            wrong.append(f"{where}: imports the whole of flax; name the module")
        beside = f"configs/{top}.py" in files
        if path.startswith("configs/") and top not in {"ml_collections", "__future__"} and not beside:
            wrong.append(f"{where}: imports {full}; a config imports ml_collections or another config alone")
        if path.startswith("sr3_jax/diffusion/"):
            own = full.startswith(("sr3_jax.types", "sr3_jax.diffusion"))
            if not own and (top not in CORE_LIBRARIES | STANDARD or top in CORE_NEVER):
                wrong.append(f"{where}: imports {full}; the core knows jax, numpy, aliases and itself alone")
        if top == "sr3_jax" and floor is not None:
            target = _target(module, name, files)
            if target is None:
                wrong.append(f"{where}: imports {full}, and there is no such file")
                continue
            below = _floor(target)
            if below is not None and below >= floor and not target.endswith("__init__.py"):
                wrong.append(f"{where}: floor {floor} imports {target} of floor {below}")
    return wrong


def _sources() -> dict[str, str]:
    folders = ("sr3_jax", "configs", "tests")
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_every_file_keeps_to_its_floor():
    sources = _sources()
    assert len(sources) > 10, "the sources were not found"
    files = set(sources)
    wrong = [line for path, source in sources.items() for line in violations(path, source, files)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_floor_has_its_file():
    """A table that names what is gone misleads."""
    gone = [room for room in FLOORS if not (ROOT / "sr3_jax" / room).exists()]
    assert not gone


FILES = {
    "configs/other.py",
    *(f"sr3_jax/{room}" for room in FLOORS if not room.endswith("/")),
    *(
        "sr3_jax/cli/main.py",
        "sr3_jax/cli/train.py",
        "sr3_jax/diffusion/__init__.py",
        "sr3_jax/data/__init__.py",
    ),
}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        (
            "sr3_jax/image_ops.py",
            "from sr3_jax.metrics import psnr",
            "floor 1 imports sr3_jax/metrics.py of floor 1",
        ),
        ("sr3_jax/image_ops.py", "import sr3_jax.metrics", "floor 1 imports"),
        (
            "sr3_jax/image_ops.py",
            "from sr3_jax import model",
            "floor 1 imports sr3_jax/inference/model.py of floor 5",
        ),
        (
            "sr3_jax/image_ops.py",
            "from . import model as m",
            "floor 1 imports sr3_jax/inference/model.py of floor 5",
        ),
        (
            "sr3_jax/diffusion/loss.py",
            "from .solvers import ddim",
            "floor 2 imports sr3_jax/diffusion/solvers.py",
        ),
        ("sr3_jax/diffusion/loss.py", "from .. import model", "floor 2 imports sr3_jax/inference/model.py"),
        (
            "sr3_jax/inference/model.py",
            "def f():\n    from sr3_jax.config.experiment import read",
            ":2: floor 5 imports",
        ),
        ("sr3_jax/types.py", "from sr3_jax.image_io.image_file import Image", "floor 0 imports"),
        (
            "sr3_jax/cli/train.py",
            "from sr3_jax.cli import main",
            "floor 10 imports sr3_jax/cli/main.py of floor 10",
        ),
        (
            "sr3_jax/data/batches.py",
            "from sr3_jax.data import prepare",
            "floor 3 imports sr3_jax/data/prepare.py",
        ),
        ("sr3_jax/inference/model.py", "from sr3_jax.nowhere import x", "there is no such file"),
        ("sr3_jax/utils.py", "", "has no floor"),
        ("sr3_jax/nn/new.py", "", "has no floor"),
        ("sr3_jax/image_ops.py", "\n" * 301, "is longer than 300 lines"),
        ("sr3_jax/diffusion/loss.py", "import optax", "the core knows"),
        ("sr3_jax/diffusion/loss.py", "from sr3_jax.image_ops import to_unit", "the core knows"),
        ("sr3_jax/diffusion/loss.py", "import logging", "the core knows"),
        ("sr3_jax/inference/model.py", "from flax import linen as nn", "imports flax.linen"),
        ("sr3_jax/inference/model.py", "import flax.linen as nn", "imports flax.linen"),
        ("sr3_jax/inference/model.py", "from flax.linen import Module", "imports flax.linen"),
        ("sr3_jax/inference/model.py", "import flax", "the whole of flax"),
        ("sr3_jax/inference/model.py", "from orbax.checkpoint import v1", "imports orbax"),
        ("sr3_jax/inference/model.py", "import tensorflow_datasets as tfds", "imports tensorflow_datasets"),
        ("sr3_jax/train/loop.py", "import grain.python as grain", "imports grain"),
        ("sr3_jax/inference/model.py", "from ml_collections import ConfigDict", "imports ml_collections"),
        ("configs/faces.py", "import numpy as np", "ml_collections or another config alone"),
        ("configs/faces.py", "from sr3_jax import images", "ml_collections or another config alone"),
        ("tests/test_images.py", "import torch", "imports torch, which only nobody may"),
        ("sr3_jax/data/sources.py", "import tensorflow as tf", "imports tensorflow, which only nobody may"),
    ],
)
def test_a_breach_is_found(path: str, source: str, complaint: str):
    found = violations(path, source, FILES)
    assert any(complaint in line for line in found), found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "sr3_jax/inference/model.py",
            "from sr3_jax import __version__, images\nfrom sr3_jax.diffusion import sampler",
        ),
        (
            "sr3_jax/diffusion/loss.py",
            "import dataclasses\nimport jax.numpy as jnp\nfrom .process import diffuse",
        ),
        ("sr3_jax/nn/unet.py", "from flax import linen as nn\nfrom sr3_jax.nn.blocks import Norm"),
        ("sr3_jax/train/state.py", "from flax import struct"),
        ("sr3_jax/data/sources.py", "import tensorflow_datasets as tfds"),
        ("configs/faces.py", "from ml_collections import ConfigDict\nfrom other import get_config"),
        ("sr3_jax/cli/train.py", "def run(args):\n    from sr3_jax.train.loop import train"),
        ("tests/test_images.py", "from sr3_jax import images\nimport tensorflow_datasets"),
    ],
)
def test_what_is_allowed_is_let_through(path: str, source: str):
    assert violations(path, source, FILES) == []
