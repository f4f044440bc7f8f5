"""What a program's costs mean on given chips: seconds, whether it fits, and what to change if it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sr3_jax.distributed.sharding import fsdp_spec
from sr3_jax.planning.topologies import Chip, Topology

# How much of a data sheet's figure a program is assumed to reach. Assumed, not measured.
REACHED = {"flops": 0.5, "memory": 0.8, "interconnect": 0.5}
MARGIN = 0.9  # of the memory: what changes are to bring the need down to
# What a change leaves of the temporaries. Assumed, not measured; a plan of the changed config tells.
LEFT = {"bfloat16": 0.6, "remat": 0.4}


def seconds(chip: Chip, *, flops: float, memory: float, interconnect: float) -> dict[str, float] | None:
    """The time of one run on one chip that has so many FLOPs to do and bytes to move; None for an unknown chip.

    'low' is the longest of the three, as if they went on at once, 'high' their sum, as if one after the other.
    """
    if chip.flops is None or chip.bandwidth is None or chip.interconnect is None:
        return None
    parts = {
        "flops": flops / (chip.flops * REACHED["flops"]),
        "memory": memory / (chip.bandwidth * REACHED["memory"]),
        "interconnect": interconnect / (chip.interconnect * REACHED["interconnect"]),
    }
    return parts | {"low": max(parts.values()), "high": sum(parts.values())}


def state_bytes(shapes: Iterable[tuple[tuple[int, ...], int]], fsdp: int) -> int:
    """Bytes a chip of arrays given as (shape, itemsize), under the rule that shards them over `fsdp` chips."""
    total = 0
    for shape, itemsize in shapes:
        split = any(fsdp_spec(shape, itemsize, fsdp))
        total += math.prod(shape) * itemsize // (fsdp if split else 1)
    return total


def weight_traffic(
    shapes: Iterable[tuple[tuple[int, ...], int]],
    *,
    data: int,
    fsdp: int,
    rounds: int,
    itemsize: int,
    gradients: bool,
) -> dict[str, list[float]]:
    """kind -> [count, bytes that a ring sends from each chip] of a program, by the rule and not from a compiler.

    A sharded weight is gathered each time it is used, in the compute type's `itemsize`: once in each of `rounds`, and
    with `gradients` again on the way back, when its gradient is scattered and then averaged over 'data'. The gradient
    of what is not sharded is averaged whole.
    """
    found: dict[str, list[float]] = {}

    def send(kind: str, count: int, size: float) -> None:
        if size > 0:
            mine = found.setdefault(kind, [0, 0.0])
            mine[0] += count
            mine[1] += size

    for shape, own in shapes:
        size = math.prod(shape)
        if any(fsdp_spec(shape, own, fsdp)):
            away, times = (fsdp - 1) / fsdp * size * itemsize, (2 if gradients else 1) * rounds
            send("all-gather", times, times * away)
            if gradients:
                send("reduce-scatter", rounds, rounds * away)
                send("all-reduce", rounds, rounds * 2 * (data - 1) / data * size * itemsize / fsdp)
        elif gradients:
            send("all-reduce", rounds, rounds * 2 * (data * fsdp - 1) / (data * fsdp) * size * own)
    return found


def fsdp_sizes(topology: Topology) -> list[int]:
    """Sizes of 'fsdp' whose rings lie along whole sides of the slice; on GPUs and CPUs whatever divides the number."""
    if topology.chip.backend != "tpu":
        return [size for size in range(1, topology.count + 1) if topology.count % size == 0]
    sizes = {1}
    for side in topology.shape:
        sizes |= {size * side for size in sizes}
    return sorted(sizes)


def advise(
    config: Mapping[str, Mapping[str, Any]],
    topology: Topology,
    *,
    fsdp: int,
    resident: Callable[[int], int],
    temporaries: int,
    program: str = "train",
) -> dict[str, Any]:
    """What to change in a config that needs more memory than a chip has: first what costs no time, last the batch.

    Args:
        fsdp: the size of the mesh's axis now.
        resident: fsdp -> bytes a chip of what stays: the state, and what the program is given besides.
        temporaries: bytes a chip of what comes and goes.
        program: 'train', or 'sample': the held-out evaluation.

    Returns:
        'overrides' that go together, the 'bytes' a chip that they should bring the need down to, and whether these
        are 'enough'.
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

    # The state, until it is a quarter: sharding it costs messages, which the links are made for.
    for size in fsdp_sizes(topology):
        large = need() > limit and resident(fsdp) > limit / 4
        if size > fsdp and large and resident(size) < resident(fsdp):
            fsdp = size
            overrides["mesh.fsdp"] = size
    # The activations: half as wide, recomputed, of fewer examples at a time.
    if need() > limit and config["model"]["dtype"] == "float32":
        change("model.dtype", "bfloat16", LEFT["bfloat16"])
    if program == "train":
        if need() > limit and not config["model"]["remat"]:
            change("model.remat", True, LEFT["remat"])
        batch, accumulation = config["train"]["batch_size"], config["train"]["accumulation"]
        field, rows = "train.accumulation", batch // (topology.count * accumulation)
        if need() > limit and rows > 1:
            room = max(limit - resident(fsdp), 1.0)
            parts = [size for size in range(2, rows + 1) if rows % size == 0]
            part = next((size for size in parts if left / size <= room), parts[-1])
            change(field, accumulation * part, 1 / part)
    elif need() > limit:
        field, images = "eval.num_images", config["eval"]["num_images"]
        rows = -(-images // topology.count)
        fewer = max(1, min(rows - 1, int(rows * max(limit - resident(fsdp), 0.0) / left)))
        if rows > 1:
            change(field, fewer * topology.count, fewer / rows)
    given = [f"--config.{field}={value}" for field, value in overrides.items()]
    return {"overrides": given, "bytes": int(need()), "enough": need() <= topology.memory}
