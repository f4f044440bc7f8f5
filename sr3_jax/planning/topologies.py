"""Topologies to plan for: accelerator chips and their memory, and slices of them by name, such as v5e:16x16."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from sr3_jax.errors import UserError
from sr3_jax.memory import GPU_MEMORY_FRACTION, device_memory

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        backend: 'tpu', whose compiler runs without a TPU; 'gpu' or 'cpu', for which cost is estimated from shapes.
        memory: bytes available to a program; None: the memory of this machine, shared by the chips.
    """

    name: str
    backend: str
    memory: int | None = None


# TPU: what libtpu leaves to a program of the 32, 16, 95 and 32 GB, according to its own errors ("exceeds available
# HBM (15.75G)"). GPU: the share that `sr3 train` lets JAX take, of the size in NVIDIA's data sheets of the SXM modules
# (in units of 10^9 bytes; the driver reports a few percent more).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", int(30.75 * GIB)),
        Chip("v5e", "tpu", int(15.75 * GIB)),
        Chip("v5p", "tpu", int(95.74 * GIB)),
        Chip("v6e", "tpu", int(31.25 * GIB)),
        Chip("a100", "gpu", int(GPU_MEMORY_FRACTION * 80e9)),
        Chip("h100", "gpu", int(GPU_MEMORY_FRACTION * 80e9)),
        Chip("h200", "gpu", int(GPU_MEMORY_FRACTION * 141e9)),
        Chip("cpu", "cpu"),
    )
}
GPUS_OF_A_NODE = 8
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # v4 and v5p, below a cube of 4x4x4
LARGEST = {"v4": 4096, "v5p": 6144}  # chips of one slice
EXAMPLES = "v5e:16x16, v6e:4x4, v4:4x4x4, v5p:4x4x4, gpu:8xh100, gpu:64xh100 or cpu:8"


@dataclass(frozen=True)
class Topology:
    """A group of chips that run one job.

    Attributes:
        name: as the user writes it.
        shape: the grid of chips; (N,) for GPUs and CPUs.
        slices: groups of chips with fast links: one TPU slice, the nodes of GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """The number of chips, each of which is one device."""
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes per chip that are available to a program."""
        if self.chip.memory is not None:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count


def parse(text: str) -> Topology:
    """The topology of a name such as 'v5e:16x16', 'gpu:8xh100' or 'cpu:8'.

    Raises:
        UserError: an unknown chip, or a shape that does not exist for that chip.
    """
    kind, colon, size = text.strip().lower().partition(":")
    tpus = [name for name, chip in CHIPS.items() if chip.backend == "tpu"]
    if kind not in (*tpus, "gpu", "cpu") or not colon:
        near = difflib.get_close_matches(kind, [*tpus, "gpu", "cpu"], n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}:{size or 'SHAPE'}?" if near and colon else ";"
        raise UserError(f"--topology={text} is unknown{hint} use a topology such as {EXAMPLES}")
    if kind == "gpu":
        return _gpus(text, size)
    if kind == "cpu":
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--topology={text}: must be a number of devices, such as cpu:8")
        return Topology(f"cpu:{int(size)}", CHIPS["cpu"], (int(size),))
    if not re.fullmatch(r"\d+(x\d+)+", size):
        raise UserError(f"--topology={text}: must be the shape of a slice, such as {_example(kind)}")
    shape = tuple(int(side) for side in size.split("x"))
    size = "x".join(map(str, shape))
    if kind in LARGEST and not (size in SMALL or _cubes(shape, LARGEST[kind])):
        raise UserError(
            f"--topology={text}: the shape for {kind} must be one of {', '.join(SMALL)}, or three "
            f"multiples of 4 in ascending order up to {LARGEST[kind]} chips, such as {kind}:4x4x8"
        )
    if kind not in LARGEST and size not in FLAT:
        raise UserError(f"--topology={text}: the shape for {kind} must be one of {', '.join(FLAT)}")
    return Topology(f"{kind}:{size}", CHIPS[kind], shape)


def of_this_job() -> Topology:
    """The devices of this job, each with the memory that a program can have on the devices of this process."""
    devices = jax.devices()
    chip = Chip(devices[0].device_kind.lower(), devices[0].platform, device_memory())
    slices = len({getattr(device, "slice_index", None) for device in devices})
    return Topology(f"{chip.backend}:{len(devices)}", chip, (len(devices),), slices)


def _gpus(text: str, size: str) -> Topology:
    """N GPUs, which are nodes of 8 if they are more than 8; or NODES x GPUS of a node."""
    known = [name for name, chip in CHIPS.items() if chip.backend == "gpu"]
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([a-z]+\d+)", size)
    if not match or match[3] not in known:
        raise UserError(
            f"--topology={text}: must be a number of {', '.join(known)}, such as gpu:8x{known[1]}; for other cards "
            "use the one whose memory is nearest"
        )
    nodes, count = int(match[1] or 0), int(match[2])
    if nodes:
        count *= nodes
    elif count <= GPUS_OF_A_NODE:
        nodes = 1
    else:
        nodes, rest = divmod(count, GPUS_OF_A_NODE)
        if rest:
            raise UserError(
                f"--topology={text}: {count} GPUs are not whole nodes of {GPUS_OF_A_NODE}: use a multiple, or nodes x "
                f"GPUs of a node, such as gpu:{-(-count // 4)}x4x{match[3]}"
            )
    return Topology(f"gpu:{size}", CHIPS[match[3]], (count,), nodes)


def _cubes(shape: Sequence[int], largest: int) -> bool:
    whole = len(shape) == 3 and all(side > 0 and side % 4 == 0 for side in shape)
    return whole and list(shape) == sorted(shape) and math.prod(shape) <= largest


def _example(kind: str) -> str:
    return f"{kind}:4x4x4" if kind in LARGEST else f"{kind}:4x4"


@contextmanager
def compiler(topology: Topology) -> Iterator[list[jax.Device]]:
    """Yield the devices of a TPU slice, for which libtpu compiles inside the context; no TPU is needed.

    Raises:
        UserError: libtpu is not installed, or does not support the shape.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs libtpu, the TPU's compiler, which is not installed: run "
            "pip install 'jax[tpu]' (no TPU is needed), or add --estimate"
        )
    from jax.experimental import topologies

    # A v4 chip has two cores; JAX runs them as one device, which libtpu calls a megacore.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with _environment(_quiet(topology)):
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"libtpu does not support --topology={topology.name}: {reason}") from error
        if len(found.devices) != topology.count:
            raise UserError(
                f"--topology={topology.name} has {topology.count} chips, but libtpu reports {len(found.devices)} "
                "devices: install the libtpu version that jax requires with pip install 'jax[tpu]'"
            )
        yield list(found.devices)


def _quiet(topology: Topology) -> dict[str, str]:
    """Environment variables that keep libtpu from looking for a machine, locking it, and logging."""
    return {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.count}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is used, so plans may run at the same time
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
