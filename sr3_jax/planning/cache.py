"""Results of earlier plans, so that nobody waits twice for the same compilation."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sr3_jax
from sr3_jax.files import write_text

# What a program depends on, of the config: sections and their fields, () for all.
MATTERS: Mapping[str, tuple[str, ...]] = {
    "model": (),
    "diffusion": (),
    "data": ("crop", "shrink", "scale", "label_dropout", "augment", "augment_largest", "augment_share"),
    "optim": ("clip_norm", "decay"),
    "train": ("batch_size", "accumulation"),
    "eval": ("num_images", "steps", "solver"),
    "mesh": (),
}
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")
# Rooms that no program is made in.
BESIDE = (
    "cli/",
    "data/",
    "models/",
    "report.py",
    "image",
    "planning/text.py",
    "planning/topologies.py",
    "processes.py",
    "signals.py",
)


def folder() -> Path:
    """Where results are kept: $XDG_CACHE_HOME/sr3_jax/plans."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sr3_jax" / "plans"


def key(config: Mapping[str, Mapping[str, Any]], **more: Any) -> str:
    """Equal for equal programs: the fields that matter, `more`, the libraries' versions and this package's source."""
    fields = {
        section: {name: value for name, value in config[section].items() if not names or name in names}
        for section, names in MATTERS.items()
    }
    whole = {"config": fields, "more": more, "versions": versions(), "source": source()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=list).encode()).hexdigest()[:32]


def load(file: Path) -> dict[str, Any] | None:
    """A result, or None if there is none that can be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "memory" in value else None


def save(file: Path, value: Mapping[str, Any]) -> None:
    """Keep a result, whole or not at all; a cache that cannot be written is no reason to lose it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(value, indent=1))
    except (OSError, ValueError):
        pass


def versions() -> dict[str, str]:
    """Of the libraries that make a program, as far as they are installed."""
    found = {"sr3_jax": sr3_jax.__version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> str:
    """A digest of the rooms that programs are made in."""
    root = Path(sr3_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(BESIDE):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def circumstances() -> dict[str, Any]:
    """When, with what and on what machine a result is made."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
