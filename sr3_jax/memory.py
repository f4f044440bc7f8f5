"""The memory that a compiled program needs, and what is free, so that one that does not fit ends with a sentence.

Without this, Linux kills a process that takes too much memory, and an accelerator fails in the middle of its work.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sr3_jax.errors import UserError

# Share of a GPU's memory that training lets JAX take, and that `sr3 plan` judges by. JAX's own default is 0.75. The
# rest is for the CUDA context, NCCL and the libraries' workspaces.
GPU_MEMORY_FRACTION = 0.9
_FRACTION_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # the new and the old name
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
_CACHES = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


class OutOfMemory(UserError, MemoryError):
    """A program needs more memory than is free.

    Attributes:
        needed, free: bytes.
    """

    def __init__(self, message: str, *, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


def use_most_gpu_memory(environment: MutableMapping[str, str]) -> None:
    """Let JAX take GPU_MEMORY_FRACTION of each GPU, unless the user has set a share. Call it before JAX uses a GPU."""
    if not any(environment.get(name) for name in _FRACTION_VARIABLES):
        environment[_FRACTION_VARIABLES[0]] = str(GPU_MEMORY_FRACTION)


def program_memory(compiled: Any) -> dict[str, int] | None:
    """Bytes per device of a compiled program; None if the backend does not say.

    Returns:
        'arguments', 'outputs', 'aliased' (outputs in the memory of arguments), 'temporaries', 'code', and 'peak', which
        is all of these.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    found = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    return found | {"peak": sum(found.values()) - 2 * found["aliased"]}


def needed_bytes(compiled: Any) -> int:
    """Bytes per device that a compiled program needs beyond its arguments; 0 if that is unknown."""
    found = program_memory(compiled)
    return 0 if found is None else found["peak"] - found["arguments"]


def require(needed: int, devices: Sequence[jax.Device], *, what: str, remedy: str) -> None:
    """Check that a program, whose arguments are in memory, fits into what is free there.

    Args:
        needed: bytes per device, see `needed_bytes`.
        devices: of this process, on which it will run.
        what: names the program in the error.
        remedy: what to do, in the error.

    Raises:
        OutOfMemory: it does not fit.
    """
    if devices[0].platform == "cpu":
        needed *= len(devices)  # they share the memory of the machine
        free = free_host_bytes()
    else:
        known = [free for device in devices if (free := _free_device_bytes(device)) is not None]
        free = min(known, default=None)
    if free is not None and needed > free:
        raise OutOfMemory(
            f"{what} needs {needed / 1e9:.2f} GB of memory, but {free / 1e9:.2f} GB are free: {remedy}",
            needed=needed,
            free=free,
        )


def device_memory() -> int | None:
    """Bytes per local device that a program can have; None if unknown. CPU devices share what is free."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        free = free_host_bytes()
        return None if free is None else free // len(devices)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((limit for limit in limits if limit is not None), default=None)


def _free_device_bytes(device: jax.Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still use: of the machine, and of its control groups (containers, jobs).

    None where that is unknown, as on macOS.

    Args:
        root: of the file systems /proc and /sys.
    """
    found = [*_free_in_groups(root)]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return max(0, min(found)) if found else None


def _free_in_groups(root: Path) -> Iterator[int]:
    """Bytes below the limit of each control group, of version 1 or 2, that has one; file caches count as free."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = base / path.lstrip("/")  # does not exist in a container that sees its own group as the root
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(base):
                break
            for limit, used in _CGROUP_FILES:
                try:
                    free = int((folder / limit).read_text()) - int((folder / used).read_text())
                    caches = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such files; 'max' is no limit
                    continue
                own, total = (
                    sum(int(caches.get(name, 0)) for name in names) for names in (_CACHES[:2], _CACHES[2:])
                )
                yield free + max(own, total)
