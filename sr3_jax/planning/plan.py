"""Checks whether a training job fits a topology, before paying for it, and suggests changes if it does not."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import sr3_jax
from sr3_jax.distributed.sharding import AXES, make_mesh, mesh_sizes
from sr3_jax.errors import UserError
from sr3_jax.files import read_json, write_text
from sr3_jax.planning import programs as costs
from sr3_jax.planning.programs import PROGRAMS, Watch
from sr3_jax.planning.topologies import Topology, compiler
from sr3_jax.train.experiment import Experiment, check_batch
from sr3_jax.train.state import TrainState

MARGIN = 0.9  # share of a chip's memory that the suggested changes aim for
# Share of the temporaries that remains after a change. Assumed; plan the changed config to verify.
REMAINING = {"bfloat16": 0.6, "remat": 0.4}

# The config fields that a program depends on, by section; () for all of a section.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "model": (),
    "diffusion": (),
    "data": ("crop", "shrink", "scale", "label_dropout", "augment", "augment_largest", "augment_share"),
    "degradation": (),
    "second_degradation": (),
    "optim": ("optimizer", "clip_norm", "ema_decay"),
    "train": ("batch_size", "accumulation"),
    "eval": ("num_images",),
    "sampling": ("steps", "solver"),
    "mesh": (),
}
LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def plan(
    experiment: Experiment,
    topology: Topology,
    *,
    programs: Sequence[str] = tuple(PROGRAMS),
    estimate: bool = False,
    quick: bool = False,
    cache: Path | None = None,
    refresh: bool = False,
    watch: Watch = lambda title: contextlib.nullcontext(),
) -> dict[str, Any]:
    """Plan an experiment on a topology; the result is plain JSON.

    On a TPU topology the programs are compiled by libtpu, which needs no TPU. On other topologies, or with `estimate`,
    the cost is estimated from shapes.

    Args:
        programs: 'train', the training step; 'sample', the held-out evaluation with its sampler.
        quick: compile with less effort: half the time, and memory above what the job needs.
        cache: a folder of earlier results, which are reused unless `refresh`.

    Returns:
        The job ('topology', 'chips', 'slices', 'capacity', 'parameters', 'mesh', 'batch_size', 'eval_images'),
        'estimate', 'fits', and 'programs': the cost of each (see `programs.py`) with 'other_state' (bytes per chip of
        the training state that is not an argument of the program), 'peak', 'fits' and, if it does not fit,
        'suggestion'.

    Raises:
        UserError: the config does not fit the topology, or libtpu is missing.
    """
    config = experiment.config
    estimate = estimate or topology.chip.backend != "tpu"
    sizes = mesh_sizes(
        topology.count, **config["mesh"], slices=topology.slices, state_bytes=experiment.state_bytes
    )
    check_batch(config, devices=topology.count, processes=1)
    state = costs.abstract_state_on(experiment, sizes)
    verdicts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        mesh: Mesh | None = None
        for program in programs:
            options = costs.QUICK if quick else costs.OPTIONS
            how = "estimate" if estimate else dict(options)
            name = cache_key(config, topology=topology.name, program=program, how=how)
            file = None if cache is None else cache / f"{name}.json"
            found = None if file is None or refresh else _load(file)
            if found is None:
                if estimate:
                    found = costs.estimate_program(experiment, program, state, sizes, watch)
                else:
                    if mesh is None:
                        devices = stack.enter_context(compiler(topology))
                        mesh = make_mesh(data=sizes[0], fsdp=sizes[1], devices=devices)
                    make = costs.train_program if program == "train" else costs.sample_program
                    found = costs.compile_program(
                        make(experiment, mesh),
                        title=f"{PROGRAMS[program]} for {topology.name}",
                        platform=topology.chip.backend,
                        options=options,
                        watch=watch,
                    )
                found |= provenance()
                if file is not None:
                    _save(file, found)
            verdicts[program] = _verdict(found, program, config, topology, state, sizes)
    return {
        "topology": topology.name,
        "chips": topology.count,
        "slices": topology.slices,
        "capacity": topology.memory,
        "estimate": estimate,
        "parameters": sum(math.prod(shape) for shape, _ in _shapes(state.params)),
        "mesh": dict(zip(AXES, sizes, strict=True)),
        "batch_size": config["train"]["batch_size"],
        "eval_images": config["eval"]["num_images"],
        "programs": verdicts,
        "fits": all(result["fits"] for result in verdicts.values()),
    }


# ---- The verdict.


def _verdict(
    found: Mapping[str, Any],
    program: str,
    config: Mapping[str, Any],
    topology: Topology,
    state: TrainState,
    sizes: tuple[int, int],
) -> dict[str, Any]:
    memory = found["memory"]
    whole, weights = _shapes(state), _shapes(state.ema_params)
    # While a run evaluates, the rest of its state stays in memory.
    other = 0
    if program == "sample":
        other = costs.state_bytes(whole, sizes[1]) - costs.state_bytes(weights, sizes[1])
    peak = memory["peak"] + other
    fits = peak <= topology.memory and "compiler_error" not in found
    result = {**found, "other_state": other, "peak": peak, "fits": fits}
    if not fits:
        rest = peak - memory["temporaries"] - costs.state_bytes(whole, sizes[1])
        result["suggestion"] = suggest(
            config,
            topology,
            fsdp=sizes[1],
            resident=lambda fsdp: costs.state_bytes(whole, fsdp) + max(0, rest),
            temporaries=memory["temporaries"],
            program=program,
        )
    return result


def suggest(
    config: Mapping[str, Mapping[str, Any]],
    topology: Topology,
    *,
    fsdp: int,
    resident: Callable[[int], int],
    temporaries: int,
    program: str = "train",
) -> dict[str, Any]:
    """Changes to a config that needs more memory than a chip has, the cheapest first.

    Args:
        fsdp: current size of the mesh's 'fsdp' axis.
        resident: fsdp -> bytes per chip that stay allocated: the state and the program's other arguments.
        temporaries: bytes per chip of the program's temporaries.
        program: 'train' or 'sample'.

    Returns:
        'overrides', to be given together; 'bytes' per chip that the changed config should need; 'enough', whether
        those fit.
    """
    limit = MARGIN * topology.memory
    overrides: dict[str, Any] = {}
    left = float(temporaries)

    def need() -> float:
        return resident(fsdp) + left

    def change(field: str, value: Any, factor: float) -> None:
        nonlocal left
        overrides[field] = value
        left *= factor

    # Shard the state until it takes a quarter of the memory: this costs communication, not compute.
    for size in fsdp_sizes(topology):
        large = need() > limit and resident(fsdp) > limit / 4
        if size > fsdp and large and resident(size) < resident(fsdp):
            fsdp = size
            overrides["mesh.fsdp"] = size
    # Then the activations: half the width, recomputation, fewer examples at a time.
    if need() > limit and config["model"]["dtype"] == "float32":
        change("model.dtype", "bfloat16", REMAINING["bfloat16"])
    if program == "train":
        if need() > limit and not config["model"]["remat"]:
            change("model.remat", True, REMAINING["remat"])
        batch, accumulation = config["train"]["batch_size"], config["train"]["accumulation"]
        rows = batch // (topology.count * accumulation)
        if need() > limit and rows > 1:
            available = max(limit - resident(fsdp), 1.0)
            factors = [size for size in range(2, rows + 1) if rows % size == 0]
            factor = next((size for size in factors if left / size <= available), factors[-1])
            change("train.accumulation", accumulation * factor, 1 / factor)
    elif need() > limit:
        rows = -(-config["eval"]["num_images"] // topology.count)
        fewer = max(1, min(rows - 1, int(rows * max(limit - resident(fsdp), 0.0) / left)))
        if rows > 1:
            change("eval.num_images", fewer * topology.count, fewer / rows)
    given = [f"--config.{field}={value}" for field, value in overrides.items()]
    return {"overrides": given, "bytes": int(need()), "enough": need() <= topology.memory}


def fsdp_sizes(topology: Topology) -> list[int]:
    """Sizes of 'fsdp' that cover whole sides of a TPU slice; every divisor of a GPU node or of the CPU devices."""
    if topology.chip.backend != "tpu":
        per_node = topology.count // topology.slices
        return [size for size in range(1, per_node + 1) if per_node % size == 0]
    sizes = {1}
    for side in topology.shape:
        sizes |= {size * side for size in sizes}
    return sorted(sizes)


def _shapes(tree: Any) -> list[tuple[tuple[int, ...], int]]:
    return [(leaf.shape, leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]


# ---- The cache.


def cache_key(config: Mapping[str, Mapping[str, Any]], **more: Any) -> str:
    """A hash of everything that a program depends on: config fields, `more`, library versions and source code."""
    fields = {
        section: {name: value for name, value in config[section].items() if not names or name in names}
        for section, names in FIELDS.items()
    }
    whole = {"config": fields, "more": more, "versions": versions(), "source": source_hash()}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=list).encode()).hexdigest()[:32]


def source_hash() -> str:
    """A hash of all source files of this package."""
    root = Path(sr3_jax.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of the installed libraries that make a program."""
    found = {"sr3_jax": sr3_jax.__version__}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance() -> dict[str, Any]:
    """Date, library versions and machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


def _load(file: Path) -> dict[str, Any] | None:
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "memory" in value else None


def _save(file: Path, value: Mapping[str, Any]) -> None:
    # A cache that cannot be written must not lose the result.
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(value, indent=1))
