"""What a job can be planned for: chips by their public data sheets, and slices of them by name, such as v5e:16x16."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax

from sr3_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        backend: 'tpu', whose compiler needs no TPU; 'gpu' or 'cpu', of which only the shapes are planned.
        memory: bytes that a program can have of it; None: what this machine has, shared.
        flops: bfloat16 FLOP/s at its peak, None if unknown.
        bandwidth: bytes/s between memory and chip, None if unknown.
        interconnect: bytes/s that leave the chip for its neighbours, all links together; None if unknown.
    """

    name: str
    backend: str
    memory: int | None = None
    flops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None


# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables "key specifications"; there the interconnect is in both
# directions (v5e 400, v5p 1200, v6e 800 GB/s), here in one; v4's is six links of 50 GB/s (Jouppi et al. 2023,
# arXiv:2304.01433, table 4). `memory` is what libtpu's compiler leaves a program of the 32, 16, 95 and 32 GB, as its
# own errors say ("exceeds available HBM (15.75G)").
# GPU: NVIDIA's data sheets "A100", "H100" and "H200 Tensor Core GPU", SXM forms, dense bfloat16; of NVLink's 600 and
# 900 GB/s half is in each direction. 5% of the memory is taken to be the driver's and NCCL's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", int(30.75 * GIB), 275e12, 1.2e12, 300e9),
        Chip("v5e", "tpu", int(15.75 * GIB), 197e12, 819e9, 200e9),
        Chip("v5p", "tpu", int(95.74 * GIB), 459e12, 2.765e12, 600e9),
        Chip("v6e", "tpu", int(31.25 * GIB), 918e12, 1.64e12, 400e9),
        Chip("a100", "gpu", int(0.95 * 80e9), 312e12, 2.039e12, 300e9),
        Chip("h100", "gpu", int(0.95 * 80e9), 989e12, 3.35e12, 450e9),
        Chip("h200", "gpu", int(0.95 * 141e9), 989e12, 4.8e12, 450e9),
        Chip("cpu", "cpu"),
    )
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # v4 and v5p, below a cube of 4x4x4
LARGEST = {"v4": 4096, "v5p": 6144}  # chips of one slice
EXAMPLES = "v5e:16x16, v6e:4x4, v4:4x4x4, v5p:4x4x4, gpu:8xh100 or cpu:8"


@dataclass(frozen=True)
class Topology:
    """Chips that work together.

    Attributes:
        name: as the user writes it.
        shape: of the grid of chips; (N,) where there is none.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of chips, each of which is one device."""
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """Bytes that a program can have on each chip."""
        if self.chip.memory is not None:
            return self.chip.memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count


def parse(text: str) -> Topology:
    """The topology of a name such as 'v5e:16x16', 'gpu:8xh100' or 'cpu:8'.

    Raises:
        UserError: no such chip, or a shape in which that chip does not come.
    """
    kind, colon, size = text.strip().lower().partition(":")
    tpus = [name for name, chip in CHIPS.items() if chip.backend == "tpu"]
    if kind not in (*tpus, "gpu", "cpu") or not colon:
        near = difflib.get_close_matches(kind, [*tpus, "gpu", "cpu"], n=1, cutoff=0.5)
        hint = f", perhaps {near[0]}:{size or 'SHAPE'}" if near and colon else ""
        raise UserError(f"--topology={text} is not known{hint}; give one such as {EXAMPLES}")
    if kind == "gpu":
        return _gpus(text, size)
    if kind == "cpu":
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--topology={text}: give a number of devices, such as cpu:8")
        return Topology(f"cpu:{int(size)}", CHIPS["cpu"], (int(size),))
    if not re.fullmatch(r"\d+(x\d+)+", size):
        raise UserError(f"--topology={text}: give the shape of the slice, such as {_example(kind)}")
    shape = tuple(int(side) for side in size.split("x"))
    size = "x".join(map(str, shape))
    if kind in LARGEST and not (size in SMALL or _cubes(shape, LARGEST[kind])):
        raise UserError(
            f"--topology={text}: {kind} comes as {', '.join(SMALL)}, or three multiples of 4 in ascending order up to "
            f"{LARGEST[kind]} chips, such as {kind}:4x4x8"
        )
    if kind not in LARGEST and size not in FLAT:
        raise UserError(f"--topology={text}: {kind} comes as {', '.join(FLAT)}")
    return Topology(f"{kind}:{size}", CHIPS[kind], shape)


def _gpus(text: str, size: str) -> Topology:
    known = [name for name, chip in CHIPS.items() if chip.backend == "gpu"]
    match = re.fullmatch(r"([1-9]\d*)x([a-z]+\d+)", size)
    if not match or match[2] not in known:
        raise UserError(
            f"--topology={text}: give a number of {', '.join(known)}, such as gpu:8x{known[1]}; other cards: plan for "
            "the one with the nearest memory"
        )
    return Topology(f"gpu:{match[1]}x{match[2]}", CHIPS[match[2]], (int(match[1]),))


def _cubes(shape: Sequence[int], largest: int) -> bool:
    whole = len(shape) == 3 and all(side > 0 and side % 4 == 0 for side in shape)
    return whole and list(shape) == sorted(shape) and math.prod(shape) <= largest


def _example(kind: str) -> str:
    return f"{kind}:4x4x4" if kind in LARGEST else f"{kind}:4x4"


@contextmanager
def compiler(topology: Topology) -> Iterator[list[jax.Device]]:
    """Within it libtpu compiles for the devices of a TPU slice, which are yielded; there need not be any TPU.

    Raises:
        UserError: libtpu is not installed, or refuses the shape.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs the TPU's compiler, which is not installed: "
            'pip install "sr3_jax[tpu]" (no TPU is needed), or plan for the shapes alone with '
            f"--topology=cpu:{topology.count}"
        )
    from jax.experimental import topologies

    # v4 has two cores a chip; as 'megacore' they are one device, which is how JAX runs on it.
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    if topology.count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with _environment(_quiet(topology)):
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"libtpu does not take --topology={topology.name}: {reason}") from error
        if len(found.devices) != topology.count:
            raise UserError(
                f"libtpu makes {len(found.devices)} devices of --topology={topology.name}, and {topology.count} chips "
                "were expected: install the libtpu that jax asks for, with pip install 'sr3_jax[tpu]'"
            )
        yield list(found.devices)


def _quiet(topology: Topology) -> dict[str, str]:
    """What keeps libtpu from looking for a machine, from its lock file and from its logs."""
    return {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": f"{topology.chip.name}-{topology.count}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is held: several plans can be made at once
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
